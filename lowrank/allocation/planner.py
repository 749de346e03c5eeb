"""Decide: a request, a model and perhaps statistics become a plan. Nothing here changes the model."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lowrank.allocation.byte_costs import byte_costs
from lowrank.allocation.candidates import Group, Offer
from lowrank.allocation.latency import LatencyTable, latency_costs
from lowrank.allocation.quantization_losses import correction_error_curve_of, quantization_losses_of
from lowrank.allocation.refusals import nothing_changes
from lowrank.allocation.selection import select, storage_formats
from lowrank.allocation.sharing import groups_of
from lowrank.calibration.data import Batch, batches
from lowrank.calibration.statistics import Stats
from lowrank.config import CompressionConfig
from lowrank.errors import BudgetError, WeightError
from lowrank.inspection.contexts import evaluating
from lowrank.inspection.devices import device_of
from lowrank.inspection.heads import heads_of
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft, not_wanted, spells
from lowrank.inspection.timing import seconds_of
from lowrank.inspection.unplanned import with_reach
from lowrank.linalg import ErrorCurve, error_curve
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.pivots import RESOLVING
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedEmbedding, QuantizedModule, TiedLinear
from lowrank.plans.layer_plan import QuantizedWeight
from lowrank.plans.plan import Plan
from lowrank.plans.storage_formats import FLOAT, StorageFormat
from lowrank.surgery import replacement
from lowrank.surgery.factorization import check_same_weight, matrix_of, merged, metric_of

ATTEMPTS = 6
"""How often ranks are chosen because the whole model was not as fast as its layers promised, or faster."""

LEAST_STEP = 0.01
"""Share of the dense latency by which the first new choice is faster; each later one by twice as much."""

NEAR = 0.03
"""Share of the asked speedup by which a model may be faster: the rest would be lost for nothing."""


def metric_for(config: CompressionConfig, stats: Stats | None) -> str:
    """Return the metric that ``"auto"`` stands for, or the one that was asked for."""
    if config.metric != "auto":
        return config.metric
    return "weight" if stats is None else stats.best_metric()


def drafted(
    seen: Inspection,
    config: CompressionConfig,
    stats: Stats | None,
    embeddings: bool = False,
) -> Plan:
    """List the layers; with statistics, leave alone those that these do not cover.

    Where storage formats compete, and with ``embeddings``, embeddings are targets, too. Equal weights are not
    looked for where blocks are gone through one by one.
    """
    every = embeddings or len(storage_formats(config)) > 1
    equal = not config.sequential and not config.removes_neurons
    plan = draft(seen, config.targets, config.ignore, every, equal, config.overrule)
    if config.correction and config.rank is not None:
        plan = plan.with_layers(
            {x.name: replace(x, correction=True) for x in plan.targeted if not x.is_embedding}
        )
    metric = metric_for(config, stats)
    if metric == "weight" or stats is None:
        return replace(plan, metric=metric)
    layers = {}
    for layer in plan.targeted:
        check_same_weight(seen, layer.name, stats)
        reason = stats.lacks(layer.name, metric) or _lacks_user(plan, layer.name, stats)
        if reason is not None and layer.is_embedding and layer.name not in stats:
            reason = "not among those that were calibrated: calibrate with targets that spell it"
        if reason is not None:
            layers[layer.name] = replace(layer, reason=reason, targeted=False)
        elif config.add_bias and not layer.is_embedding:
            layers[layer.name] = replace(layer, added_bias=not layer.bias)
    return replace(plan, metric=metric).with_layers(layers)


def check_targeted(seen: Inspection, drafted: Plan, config: CompressionConfig) -> None:
    """Refuse a request that leaves no layer to change, or some that are compressed already.

    Args:
        seen: The model.
        drafted: Its layers, from `drafted`.
        config: What the user asked for.

    Raises:
        BudgetError: If nothing is left to change; or if it names a layer that is factorized or quantized, and
            others that are not, since it would count and change those only.
    """
    if not drafted.targeted:
        raise BudgetError(nothing_changes(with_reach(seen, drafted), config.budget, {}))
    in_heads = heads_of(seen)
    spelled, ignore = config.targets or (), config.ignore or ()
    done = []
    for layer in drafted:
        module = seen.model.get_submodule(layer.name)
        own = module.owner if isinstance(module, TiedLinear) else module
        if not isinstance(own, (LowRankLinear, LowRankEmbedding, QuantizedModule)):
            continue
        table = isinstance(own, (LowRankEmbedding, QuantizedEmbedding))
        if table and not any(spells(pattern, layer.name) for pattern in spelled):
            continue  # tables are no targets unless they are spelled
        if not_wanted(layer.name, config.targets, ignore, in_heads) is None:
            done.append(layer.name)
    if done:
        raise BudgetError(
            f"{drafted.model} is compressed already: of {len(done) + len(drafted.targeted)} layers that are "
            f"asked for, {len(done)} are factorized or quantized (the first: {done[0]}), and {config.budget} "
            f"would count and change only the others (the first: {drafted.targeted[0].name}). Call "
            "decompress(model) first, or start from the dense checkpoint; or name the dense layers in "
            "targets=, or the compressed ones in ignore=."
        )


def _lacks_user(plan: Plan, owner: str, stats: Stats) -> str | None:
    """Return why a weight cannot be measured for a layer that uses that of ``owner``, or ``None``."""
    for layer in plan.equal.get(owner, ()):
        reason = stats.lacks(layer.name, "inputs")
        if reason is not None:
            return f"has its weight in {layer.name}, too, which {reason}"
    return None


class Latencies(NamedTuple):
    """What a ``speedup`` is measured with."""

    inputs: Any
    table: LatencyTable | None


def decide(
    seen: Inspection,
    drafted: Plan,
    config: CompressionConfig,
    stats: Stats | None,
    predict: bool,
    progress: bool,
    latencies: Latencies,
    rest: Sequence[QuantizedWeight] = (),
    blocks: Sequence[Offer] = (),
) -> Plan:
    """Give every targeted layer of ``drafted`` a rank, or a reason to stay dense.

    Args:
        seen: The model, which gives the weights.
        drafted: Its layers, from `drafted`.
        config: What the user asked for.
        stats: Calibration statistics, if there are any.
        predict: Whether to predict errors also where they decide nothing.
        progress: Show a progress bar on a terminal.
        latencies: What a ``speedup`` is measured with.
        rest: What is quantized of all that is not targeted, for a budget in bytes.
        blocks: The widths that feed-forward blocks can have.

    Raises:
        LowRankError: If the request cannot be met.
    """
    _check_can_decide(drafted, config, stats, latencies)
    model = seen.model
    stats = merged(stats, drafted)
    groups = groups_of(model, drafted, config.share, config.share_size, config.budget, stats, predict)
    formats = storage_formats(config)
    corrects = config.budget.name == "rank" and config.correction
    measured = (
        error_curves_of(model, drafted, stats, progress, formats[0] if corrects else FLOAT) if predict else {}
    )
    measured = {name: _with_held_out(drafted, name, curve, stats) for name, curve in measured.items()}
    groups = [_with_held_out_of_each(drafted, group, measured) for group in groups]
    loss_per_square = None
    if drafted.metric == "loss" and stats is not None:
        loss_per_square = {layer.name: stats.loss_per_square(layer.name) for layer in drafted.targeted}
    choose = functools.partial(
        select,
        drafted,
        config,
        measured,
        loss_per_square=loss_per_square,
        groups=groups,
        pivotable=_pivotable(model, drafted),
        blocks=blocks,
    )
    if config.budget.name == "max_bytes":
        calibrated = stats.sources if stats is not None else ()
        costs = byte_costs(model, drafted, config.budget.value, rest, calibrated)
        quantization_losses = quantization_losses_of(model, drafted, formats, stats, progress)
        decided = choose(
            costs=costs, quantization_losses=quantization_losses, calibrated=calibrated, rest=rest
        )
    elif config.budget.name == "speedup":
        decided = _fast_enough(seen, drafted, choose, config.budget.value, latencies)
    else:
        decided = choose()
    if config.share == "layers":
        decided = _with_own_inputs(decided)
    return _say_what_is_coarse(decided, stats)


def _pivotable(model: nn.Module, drafted: Plan) -> set[str]:
    """Return the layers that may have pivoted factors: in half precision pivots blow up rounding errors."""
    return {
        layer.name
        for layer in drafted.targeted
        if not (layer.is_embedding or layer.correction)
        and model.get_submodule(layer.name).weight.dtype in RESOLVING  # type: ignore[union-attr]
    }


def _check_can_decide(
    drafted: Plan, config: CompressionConfig, stats: Stats | None, latencies: Latencies
) -> None:
    """Refuse a request that lacks statistics or inputs, or asks for what has no latency."""
    if drafted.metric != "weight" and stats is None:
        raise BudgetError(
            f"metric={drafted.metric!r} needs statistics: pass data=, or stats=calibrate(model, data)."
        )
    if config.budget.name == "speedup" and latencies.inputs is None:
        raise BudgetError("speedup is measured on inputs: pass inputs=, a batch as the model will get it.")
    embedding = next((layer for layer in drafted.targeted if layer.is_embedding), None)
    if config.budget.name == "speedup" and embedding is not None:
        raise BudgetError(
            f"{embedding.name}: an embedding is looked up, not multiplied, so it has no latency to choose "
            "a rank by. "
            "Take it out of targets, or give another budget than speedup."
        )


def _with_held_out(drafted: Plan, name: str, curve: ErrorCurve, stats: Stats | None) -> ErrorCurve:
    """Return the curve with the errors of trials on held-out tokens, if there were some under this metric.

    Where the trial took up the mean of the error and the layer will not, or the other way round, and where
    factors correct a quantized weight, these are not its own errors: then their ratios to what was predicted.
    """
    if stats is None or drafted.metric != stats.best_metric() or name not in stats.held_out:
        return curve
    layer, ratios = drafted[name], stats.held_out_ratios(name)
    if curve.whole is not None:
        return curve.with_ratios(ratios[0])
    if layer.is_embedding or layer.has_bias != layer.bias:
        return curve.with_ratios(ratios)
    return replace(curve, held_out=stats.held_out_means(name))


def _with_held_out_of_each(drafted: Plan, group: Group, own: Mapping[str, ErrorCurve]) -> Group:
    """Return the group with joint errors that grow on held-out tokens as those of the layers alone do."""

    def joint_error(name: str, curve: ErrorCurve) -> ErrorCurve:
        alone, last = own[name], drafted[name].break_even_rank  # beyond it, both errors come near to 0
        if alone.held_out is None:
            return curve
        ranks = torch.arange(len(curve.tail)).clamp(max=last)
        return curve.with_ratios((alone.held_out / alone.tail.clamp(min=1e-300))[ranks])

    joint = {names: tuple(map(joint_error, names, curves)) for names, curves in group.joint.items()}
    return group._replace(joint=joint)


def _with_own_inputs(plan: Plan) -> Plan:
    """Say of the layers which use a ``down`` from another block that they do not read the same input."""
    users = [layer for layer in plan.targeted if layer.shares_down_with is not None]
    return plan.with_layers({layer.name: replace(layer, same_input=False) for layer in users})


def _say_what_is_coarse(plan: Plan, stats: Stats | None) -> Plan:
    """Say in the reasons which layers are so wide that only diagonals of their moments are known."""
    if stats is None or plan.metric == "weight":
        return plan
    layers = {}
    for layer in plan.targeted:
        if stats.is_diagonal(layer.name, plan.metric):
            layers[layer.name] = replace(layer, reason=f"{layer.reason}; very wide: diagonal statistics")
    return plan.with_layers(layers)


def _fast_enough(
    seen: Inspection, drafted: Plan, choose: Callable[..., Plan], speedup: float, latencies: Latencies
) -> Plan:
    """Choose ranks by measured latencies, and measure the whole model until it is just fast enough."""
    model = seen.model
    (batch,) = batches([latencies.inputs], device=device_of(model))
    table = latencies.table if latencies.table is not None else LatencyTable.here(model)
    best, found = 0.0, None
    slack, too_little, enough = 0.0, -math.inf, math.inf  # the next to try, and what others turned out to be
    with evaluating(model):
        for attempt in range(ATTEMPTS):
            costs = latency_costs(model, drafted, lambda: batch.call(model), table, speedup, slack)
            try:
                decided = choose(costs=costs)
            except BudgetError:
                if attempt == 0:
                    raise
                break  # the layers have nothing left to give
            dense, small = _latencies(seen, decided, batch)
            best, missing = max(best, dense / small), small - dense / speedup
            if missing > 0:
                too_little = slack
                slack = min(slack + max(1.2 * missing, LEAST_STEP * 2**attempt * dense), (slack + enough) / 2)
                continue
            found = replace(decided, budget=f"{decided.budget} (measured {dense / small:.2f})")
            if dense / small <= speedup * (1 + NEAR):
                break
            enough, slack = slack, max(slack + 0.8 * missing, (slack + too_little) / 2)
    if found is not None:
        return found
    raise BudgetError(
        f"speedup={speedup!r} was not reached by the whole model; the best measured is {best:.2f}. "
        f"Ask for at most {math.floor(100 * best) / 100}, or target more layers."
    )


def _latencies(seen: Inspection, decided: Plan, batch: Batch) -> tuple[float, float]:
    """Return the median seconds of the dense model and of one with the plan's structure, run in turn."""
    model = seen.model
    dense, small = [], []
    for _ in range(3):
        dense.append(seconds_of(lambda: batch.call(model), 5, device_of(model)))
        with replacement.sketched(seen, decided):
            small.append(seconds_of(lambda: batch.call(model), 5, device_of(model)))
    return statistics.median(dense), statistics.median(small)


@without_autocast()
def error_curves_of(
    model: nn.Module,
    drafted: Plan,
    stats: Stats | None,
    progress: bool,
    storage_format: StorageFormat = FLOAT,
) -> dict[str, ErrorCurve]:
    """Decompose every targeted weight, or what ``storage_format`` loses of it, under the plan's metric.

    Raises:
        WeightError: If a weight is not finite, or not whole groups; with the layer's name.
    """
    measured = {}
    bar = tqdm(drafted.targeted, desc="error curves", unit="layer", disable=None if progress else True)
    for layer in bar:
        metric = metric_of(layer, drafted.metric, stats)
        weight = matrix_of(model.get_submodule(layer.name), layer, metric)
        try:
            if storage_format.correction and storage_format.scheme is not None and not layer.is_embedding:
                measured[layer.name] = correction_error_curve_of(
                    model, layer, storage_format.scheme, drafted.metric, stats
                )
            else:
                measured[layer.name] = error_curve(weight, metric)
        except WeightError as error:
            raise type(error)(f"{layer.name}: {error}") from error
    return measured

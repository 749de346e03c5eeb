"""Decide: a request, a model and perhaps statistics become a plan. Nothing here changes the model."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm

from lowrank._transformers import plugin
from lowrank.allocation.costs import byte_costs
from lowrank.allocation.latency import LatencyTable, latency_costs, seconds_of
from lowrank.allocation.quantization_error import correction_error_curve_of, quantization_errors_of
from lowrank.allocation.selection import nothing_changes, select
from lowrank.allocation.sharing import check_share, groups_of
from lowrank.calibration.data import Batch, batches
from lowrank.calibration.statistics import Stats
from lowrank.errors import BudgetError, WeightError
from lowrank.inspection.contexts import evaluating
from lowrank.inspection.devices import device_of
from lowrank.inspection.eligibility import check_holder
from lowrank.inspection.heads import heads_of, output_layer
from lowrank.inspection.targets import draft, not_wanted, spells
from lowrank.inspection.unplanned import with_reach
from lowrank.linalg import ErrorCurve, error_curve
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.svd import check_options
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedEmbedding, QuantizedModule, TiedLinear
from lowrank.plans.patterns import is_wildcard
from lowrank.plans.plan import METRICS, Budget, Plan, QuantizedWeight
from lowrank.plans.storage_formats import FLOAT, StorageFormat, storage_formats_of
from lowrank.surgery import replacement
from lowrank.surgery.factorization import check_layer_of, matrix_of, metric_of, pooled

ATTEMPTS = 4
"""How often ranks are chosen anew because the whole model was not as fast as its layers promised."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for; the arguments are those of `compress`."""

    budget: Budget | None = None
    metric: str
    add_bias: bool = False
    targets: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    allocation: str = "global"
    round_to: int = 8
    tolerance: float = 1e-3
    share: str | None = None
    quantize: str | None = None
    group_size: int | None = None
    correction: bool = False
    share_size: int | None = None
    overrule: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._check_codes()
        check_share(self.share, self.share_size)

    def _check_codes(self) -> None:
        """Refuse combinations of codes and budgets that have no meaning."""
        (form, *others), kind = self.forms, self.budget.name if self.budget is not None else None
        if form is not FLOAT or others:
            if kind == "speedup":
                raise BudgetError(
                    "speedup= is measured on floating-point weights. Compress to keep= or rank=, and "
                    "quantize= those."
                )
            if others and kind != "max_bytes":
                raise BudgetError('quantize="auto" chooses how each layer is stored by max_bytes= only.')
        if form.correction and kind not in ("rank", "max_bytes"):
            raise BudgetError("correction=True adds factors to the weights: give their rank=, or max_bytes=.")
        if form.correction and self.share is not None:
            raise BudgetError("correction=True has factors of each layer's own: leave out share=.")

    @property
    def forms(self) -> tuple[StorageFormat, ...]:
        """The forms in which layers may be stored."""
        return storage_formats_of(self.quantize, self.group_size, self.correction)

    @property
    def rank_step(self) -> int:
        """What chosen ranks are multiples of; where forms compete, each adds what it needs itself."""
        (form, *others) = self.forms
        return self.round_to if others else math.lcm(self.round_to, form.rank_step)

    def metric_with(self, stats: Stats | None) -> str:
        """Return the metric that ``"auto"`` stands for.

        Raises:
            BudgetError: If it is unknown, or needs statistics.
        """
        if self.metric == "auto":
            return "weight" if stats is None else stats.best_metric()
        if self.metric not in METRICS:
            raise BudgetError(f"metric={self.metric!r}: choose one of auto, {', '.join(METRICS)}.")
        return self.metric


def drafted(
    model: nn.Module,
    request: Request,
    stats: Stats | None,
    heads: Mapping[str, str],
    embeddings: bool = False,
    equal: bool = True,
) -> Plan:
    """List the layers; with statistics, leave alone those that these do not cover.

    ``heads`` are those of `known_heads`. Where forms compete, and with ``embeddings``, embedding tables are
    targets, too. Without ``equal``, equal weights are not looked for.
    """
    hf = plugin()
    separately_saved = None if not equal else hf.parts(model) if hf is not None else ()
    every = embeddings or len(request.forms) > 1
    plan = draft(model, request.targets, request.ignore, heads, every, separately_saved, request.overrule)
    if request.correction and request.budget is not None and request.budget.name == "rank":
        plan = plan.with_layers(
            {x.name: replace(x, correction=True) for x in plan.targeted if not x.is_embedding}
        )
    metric = request.metric_with(stats)
    if metric == "weight" or stats is None:
        return replace(plan, metric=metric)
    layers = {}
    for layer in plan.targeted:
        check_layer_of(model.get_submodule(layer.name), layer.name, stats)
        reason = stats.lacks(layer.name, metric) or _lacks_user(plan, layer.name, stats)
        if reason is not None and layer.is_embedding and layer.name not in stats:
            reason = "not among those that were calibrated: calibrate with targets that spell it"
        if reason is not None:
            layers[layer.name] = replace(layer, reason=reason, targeted=False)
        elif request.add_bias and not layer.is_embedding:
            layers[layer.name] = replace(layer, added_bias=not layer.bias)
    return replace(plan, metric=metric).with_layers(layers)


def known_heads(model: nn.Module) -> dict[str, str]:
    """Return ``{layer name: head}`` of layers that the model's structure shows to belong to a head.

    transformers' models say where their base ends; of others the last layer may be one.

    Raises:
        LowRankError: If the model is no module that holds layers.
    """
    check_holder(model)
    hf = plugin()
    if hf is not None and hf.is_pretrained(model):
        return hf.head_layers(model)  # type: ignore[no-any-return]
    return output_layer(model)


def check_targeted(model: nn.Module, drafted: Plan, request: Request, heads: Mapping[str, str]) -> None:
    """Refuse a request that leaves no layer to change, or some that are compressed already.

    Args:
        model: The model.
        drafted: Its layers, from `drafted`.
        request: What the user asked for.
        heads: Those of `known_heads`.

    Raises:
        BudgetError: If nothing is left to change; or if it names a layer that is factorized or coded, and
            others that are not, since it would count and change those only.
    """
    assert request.budget is not None
    if not drafted.targeted:
        raise BudgetError(nothing_changes(with_reach(model, drafted), request.budget, {}))
    in_heads = heads_of(model, heads)
    spelled, ignore = request.targets or (), request.ignore or ()
    done = []
    for layer in drafted:
        module = model.get_submodule(layer.name)
        own = module.owner if isinstance(module, TiedLinear) else module
        if not isinstance(own, (LowRankLinear, LowRankEmbedding, QuantizedModule)):
            continue
        table = isinstance(own, (LowRankEmbedding, QuantizedEmbedding))
        if table and not any(spells(pattern, layer.name) for pattern in spelled):
            continue  # tables are no targets unless they are spelled
        if not_wanted(layer.name, request.targets, ignore, in_heads) is None:
            done.append(layer.name)
    if done:
        raise BudgetError(
            f"{drafted.model} is compressed already: of {len(done) + len(drafted.targeted)} layers that are "
            f"asked for, {len(done)} are factorized or coded (the first: {done[0]}), and {request.budget} "
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


class Timing(NamedTuple):
    """What a ``speedup`` is measured with."""

    inputs: Any
    latencies: LatencyTable | None


def decide(
    model: nn.Module,
    drafted: Plan,
    request: Request,
    stats: Stats | None,
    predict: bool,
    progress: bool,
    timing: Timing,
    rest: Sequence[QuantizedWeight] = (),
) -> Plan:
    """Give every targeted layer of ``drafted`` a rank, or a reason to stay dense.

    Args:
        model: Gives the weights.
        drafted: Its layers, from `drafted`.
        request: What the user asked for.
        stats: Calibration statistics, if there are any.
        predict: Whether to predict errors also where they decide nothing.
        progress: Show a progress bar on a terminal.
        timing: What a ``speedup`` is measured with.
        rest: What is coded of all that is not targeted, for a budget in bytes.

    Raises:
        LowRankError: If the request cannot be met.
    """
    assert request.budget is not None
    check_options(request.tolerance, seed=0)
    if drafted.metric != "weight" and stats is None:
        raise BudgetError(
            f"metric={drafted.metric!r} needs statistics: pass data=, or stats=calibrate(model, data)."
        )
    if request.budget.name == "speedup" and timing.inputs is None:
        raise BudgetError("speedup is measured on inputs: pass inputs=, a batch as the model will get it.")
    table = next((layer for layer in drafted.targeted if layer.is_embedding), None)
    if request.budget.name == "speedup" and table is not None:
        raise BudgetError(
            f"{table.name}: a table is looked up, not multiplied, so it has no latency to choose a rank by. "
            "Take it out of targets, or give another budget than speedup."
        )
    stats = pooled(stats, drafted)
    groups = groups_of(model, drafted, request.share, request.share_size, request.budget, stats, predict)
    forms = request.forms
    corrects = request.budget.name == "rank" and request.correction
    measured = (
        error_curves_of(model, drafted, stats, progress, forms[0] if corrects else FLOAT) if predict else {}
    )
    loss_per_square = held_out_ratio = None
    if stats is not None and drafted.metric == stats.best_metric():  # the one that was tried
        held_out_ratio = {name: held.ratio for name, held in stats.held_out.items()}
    if drafted.metric == "loss" and stats is not None:
        loss_per_square = {layer.name: stats.loss_per_square(layer.name) for layer in drafted.targeted}
    choose = functools.partial(
        select,
        drafted,
        request.budget,
        measured,
        allocation=request.allocation,
        round_to=request.rank_step,
        given_in=forms[0].rank_step,
        named=[pattern for pattern in request.targets or () if not is_wildcard(pattern)],
        tolerance=request.tolerance,
        loss_per_square=loss_per_square,
        held_out_ratio=held_out_ratio,
        groups=groups,
    )
    if request.budget.name == "max_bytes":
        calibrated = stats.sources if stats is not None else ()
        costs = byte_costs(model, drafted, request.budget.value, rest, calibrated)
        outlooks = quantization_errors_of(model, drafted, forms, stats, progress)
        decided = choose(costs=costs, outlooks=outlooks, calibrated=calibrated, rest=rest)
    elif request.budget.name == "speedup":
        decided = _fast_enough(model, drafted, choose, request.budget.value, timing)
    else:
        decided = choose()
    if request.share == "layers":
        decided = _with_own_inputs(decided)
    return _say_what_is_coarse(decided, stats)


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
    model: nn.Module, drafted: Plan, choose: Callable[..., Plan], speedup: float, timing: Timing
) -> Plan:
    """Choose ranks by measured latencies, and measure the whole model until it is fast enough."""
    (batch,) = batches([timing.inputs], device=device_of(model))
    table = timing.latencies if timing.latencies is not None else LatencyTable.here(model)
    best = slack = 0.0
    with evaluating(model):
        for attempt in range(ATTEMPTS):
            costs = latency_costs(model, drafted, lambda: batch.call(model), table, speedup, slack)
            try:
                decided = choose(costs=costs)
            except BudgetError:
                if attempt == 0:
                    raise
                break  # the layers have nothing left to give
            dense, small = _latencies(model, decided, batch)
            best = max(best, dense / small)
            if dense / small >= speedup:
                return replace(decided, budget=f"{decided.budget} (measured {dense / small:.2f})")
            slack += 1.2 * (small - dense / speedup)
    raise BudgetError(
        f"speedup={speedup!r} was not reached by the whole model; the best measured is {best:.2f}. "
        f"Ask for at most {math.floor(100 * best) / 100}, or target more layers."
    )


def _latencies(model: nn.Module, decided: Plan, batch: Batch) -> tuple[float, float]:
    """Return the median seconds of the dense model and of one with the plan's structure, run in turn."""
    dense, small = [], []
    for _ in range(3):
        dense.append(seconds_of(lambda: batch.call(model), 5, device_of(model)))
        with replacement.sketched(model, decided):
            small.append(seconds_of(lambda: batch.call(model), 5, device_of(model)))
    return statistics.median(dense), statistics.median(small)


@without_autocast()
def error_curves_of(
    model: nn.Module, drafted: Plan, stats: Stats | None, progress: bool, form: StorageFormat = FLOAT
) -> dict[str, ErrorCurve]:
    """Decompose every targeted weight, or what ``form`` loses of it, under the plan's metric.

    Raises:
        WeightError: If a weight is not finite, or not whole groups; with the layer's name.
    """
    measured = {}
    bar = tqdm(drafted.targeted, desc="spectra", unit="layer", disable=None if progress else True)
    for layer in bar:
        metric = metric_of(layer, drafted.metric, stats)
        weight = matrix_of(model.get_submodule(layer.name), layer, metric)
        try:
            if form.correction and form.scheme is not None and not layer.is_embedding:
                measured[layer.name] = correction_error_curve_of(
                    model, layer, form.scheme, drafted.metric, stats
                )
            else:
                measured[layer.name] = error_curve(weight, metric)
        except WeightError as error:
            raise type(error)(f"{layer.name}: {error}") from error
    return measured

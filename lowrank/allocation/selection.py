"""Select ranks: error curves and a budget become a plan.

``keep``, ``max_bytes`` and ``speedup`` are one constrained problem over all layers: minimise the sum of
the layers' errors subject to what may remain (`lowrank.allocation.solver`), with the dense weight (no error,
all of the cost) always among the choices (`lowrank.allocation.candidates`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from lowrank.allocation.candidates import (
    Candidates,
    Group,
    Offer,
    QuantizationLoss,
    best_partitions,
    candidates_of,
    merged,
    partitions,
    sharing,
)
from lowrank.allocation.costs import Costs
from lowrank.allocation.refusals import nothing_changes
from lowrank.allocation.solver import allocate, uniform
from lowrank.config import Budget, CompressionConfig
from lowrank.errors import BudgetError, RankError, TargetError
from lowrank.linalg import ErrorCurve
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.patterns import is_wildcard, matches, no_match
from lowrank.plans.plan import Plan
from lowrank.plans.storage_formats import FLOAT, PIVOTED, StorageFormat, storage_formats_of
from lowrank.surgery.factorization import importance

Errors = Mapping[StorageFormat, Mapping[str, QuantizationLoss]]
"""By storage format and layer, what the format loses."""


def storage_formats(config: CompressionConfig) -> tuple[StorageFormat, ...]:
    """Return the formats in which ``config`` lets layers be stored."""
    return storage_formats_of(config.quantize, config.group_size, config.correction)


def rank_step(config: CompressionConfig) -> int:
    """Return what chosen ranks are multiples of; where formats compete, each adds what it needs itself."""
    (storage_format, *others) = storage_formats(config)
    return config.round_to if others else math.lcm(config.round_to, storage_format.rank_step)


def select(
    draft: Plan,
    config: CompressionConfig,
    error_curves: Mapping[str, ErrorCurve],
    *,
    loss_per_square: Mapping[str, float] | None = None,
    costs: Costs | None = None,
    groups: Sequence[Group] = (),
    quantization_losses: Errors = MappingProxyType({FLOAT: {}}),
    calibrated: Container[str] = (),
    rest: Sequence[QuantizedWeight] = (),
    pivotable: Container[str] = (),
    blocks: Sequence[Offer] = (),
) -> Plan:
    """Give every targeted layer of ``draft`` a rank, or the reason why it stays dense.

    Args:
        draft: The layers, from `lowrank.inspection.targets.draft`.
        config: Its budget says what may remain: an explicit rank is taken exactly, others are rounded to
            multiples. Its tolerance is the relative excess over the optimal error that `apply` may have;
            the ranks for an ``error`` or ``energy`` leave room for it, so that the bound holds in the end.
        error_curves: The error at every rank, by layer name. With a ``rank`` budget nothing is decided by
            them, so they may be missing; the predicted errors are then missing too.
        loss_per_square: Factor from each layer's squared error to the loss, where the metric is in
            units of the loss: errors of different layers are then compared as they are.
        costs: The unit of a ``max_bytes`` or ``speedup`` budget.
        groups: Layers that may share their ``down``. A given rank makes them share it; other budgets
            make them share where that is better than factors of their own.
        quantization_losses: The formats that layers may be stored in, and what each does to each; for
            ``max_bytes``.
        calibrated: The layers with statistics of their inputs, by which quantized layers scale these.
        rest: What the plan quantizes beside the targeted layers.
        pivotable: The layers that may have pivoted factors, if ``config`` wants such.
        blocks: What feed-forward blocks may become instead, if ``config`` wants such.

    Raises:
        BudgetError: If no layer would change, or ``keep`` is below what the smallest ranks need.
        RankError: If a rank exceeds ``min(out, in)`` of a named layer.
        TargetError: If a pattern of a rank mapping matches no targeted layer.
    """
    budget, round_to, tolerance = config.budget, rank_step(config), config.tolerance
    if config.pivots:
        lossless = {layer.name: QuantizationLoss() for layer in draft.targeted if layer.name in pivotable}
        quantization_losses = {FLOAT: {}, PIVOTED: lossless}
    quantized: list[QuantizedWeight] = []
    lost: dict[str, QuantizationLoss] = {}
    if budget.name == "rank":
        layers = _sharing_at_rank(_by_rank(_pivoted(draft, config, pivotable), config), groups)
    elif budget.bounds_errors:
        free = _pivoted(draft, config, pivotable)
        layers = _by_error(free, budget, error_curves, round_to, tolerance)
        layers = _sharing_within_error(draft, layers, budget, groups, round_to, tolerance)
    else:
        candidates = _candidates(
            draft, error_curves, round_to, loss_per_square, costs, groups, quantization_losses, blocks
        )
        if costs is None:
            chosen = _by_keep(draft, budget.value, candidates, config.allocation, round_to)
        else:
            chosen = _by_cost(draft, budget, candidates, costs, config.allocation)
        layers = [layer for one, point in chosen for layer in one.layers_at(point)]
        quantized = [weight for one, point in chosen for weight in one.quantized_at(point, calibrated)]
        formats = {layer.name: one.formats[point] for one, point in chosen for layer in one.layers}
        lost = {
            name: quantization_losses[storage_format][name]
            for name, storage_format in formats.items()
            if storage_format is not FLOAT
        }
    known = {**error_curves, **_joint_error_curves(layers, groups)}
    measured = {
        x.name: _with_error(x, known, loss_per_square, lost.get(x.name, QuantizationLoss())) for x in layers
    }
    plan = replace(
        draft,
        budget=str(budget),
        allocation=config.allocation,
        round_to=round_to,
        tolerance=tolerance,
    )
    plan = replace(plan.with_layers(measured), quantized=(*plan.quantized, *quantized, *rest))
    if not plan.quantized and not any(x.rank or x.is_narrower for x in measured.values()):
        raise BudgetError(nothing_changes(plan, budget, error_curves))
    return plan


def _with_error(
    layer: LayerPlan,
    error_curves: Mapping[str, ErrorCurve],
    loss_per_square: Mapping[str, float] | None,
    quantization_loss: QuantizationLoss,
) -> LayerPlan:
    """Return ``layer`` with its errors; those of quantizing count for the loss only."""
    if layer.name not in error_curves or (layer.rank is None and not quantization_loss.whole):
        return layer
    own = quantization_loss.corrected if layer.correction else None
    error_curve, rank = own or error_curves[layer.name], layer.rank
    if rank is None:
        lost = quantization_loss.whole * error_curve.expected_norm
        return replace(layer, loss_increase=loss_per_square[layer.name] * lost) if loss_per_square else layer
    squared, norm = error_curve.expected_squared_error(rank), error_curve.expected_norm
    held_out = None if error_curve.held_out is None else math.sqrt(squared / norm) if norm > 0 else 0.0
    lost = squared + quantization_loss.factors * max(0.0, error_curve.expected_squared_error(0) - squared)
    return replace(
        layer,
        relative_error=error_curve.relative_error(rank),
        held_out_error=held_out,
        loss_increase=loss_per_square[layer.name] * lost if loss_per_square else None,
    )


def _pivoted(draft: Plan, config: CompressionConfig, pivotable: Container[str]) -> Plan:
    """Return the layers with pivoted factors where they may have such, and a rank or an error is given.

    At one rank, and so at one error, pivoted factors always have the fewest parameters. An explicit rank
    means plain factors unless only pivoted ones are asked for.
    """
    if not (config.only_pivots if config.budget.name == "rank" else config.pivots):
        return draft
    layers = [layer for layer in draft.targeted if layer.name in pivotable]
    return draft.with_layers({layer.name: replace(layer, pivoted=True) for layer in layers})


def _by_rank(draft: Plan, config: CompressionConfig) -> list[LayerPlan]:
    ranks: int | Mapping[str, int] = config.budget.value
    (storage_format, *_) = storage_formats(config)
    patterns = ranks if isinstance(ranks, Mapping) else {"*": ranks}
    named = {p for p in (*(config.targets or ()), *patterns) if not is_wildcard(p)}
    for pattern in patterns if isinstance(ranks, Mapping) else ():
        if not any(matches(layer.name, pattern) for layer in draft.targeted):
            untouched = next((x for x in draft if matches(x.name, pattern)), None)
            if untouched is not None:
                raise TargetError(f'"{pattern}": {untouched.name} is not a target: {untouched.reason}.')
            raise no_match(pattern, [x.name for x in draft.targeted], "targeted layers")
    layers = []
    for layer in draft.targeted:
        given = [rank for pattern, rank in patterns.items() if matches(layer.name, pattern)]
        layers.append(
            _at_rank(layer, given[-1] if given else None, layer.name in named, storage_format.rank_step)
        )
    return layers


def _at_rank(layer: LayerPlan, rank: int | None, named: bool, step: int) -> LayerPlan:
    if rank is None:
        return layer.dense("no pattern of the rank mapping names it")
    largest = min(layer.in_features, layer.out_features)
    if rank > largest and named:
        raise RankError(
            f"{layer.name}: rank {rank} is above min(out, in) = {largest} of the weight "
            f"(out={layer.out_features}, in={layer.in_features}). Ranks that save parameters go up "
            f"to {layer.break_even_rank}."
        )
    asked, rank = rank, max(rank // step, 1) * step
    if rank > layer.break_even_rank:
        what = "would not save parameters"
        if layer.correction:
            what = "takes no less than the weight, and pays for no correction"
        return layer.dense(f"rank {rank} {what} (the largest that does: {layer.break_even_rank})")
    reason = "as asked" if rank == asked else f"{asked} as asked, in whole groups of {step}"
    return replace(layer, rank=rank, reason=reason)


def _by_error(
    draft: Plan, budget: Budget, error_curves: Mapping[str, ErrorCurve], round_to: int, tolerance: float
) -> list[LayerPlan]:
    bound = _error_bound(budget)
    layers = []
    for layer in draft.targeted:
        needed = error_curves[layer.name].smallest_rank(bound / (1 + tolerance))
        rank = -(-needed // round_to) * round_to
        if rank > layer.break_even_rank:
            rounded = f", rounded to {rank}" if rank != needed else ""
            layers.append(
                layer.dense(f"{budget} needs rank {needed}{rounded}, which would not save parameters")
            )
        else:
            layers.append(replace(layer, rank=rank, reason=f"{budget} needs rank {needed}"))
    return layers


def _sharing_at_rank(layers: list[LayerPlan], groups: Sequence[Group]) -> list[LayerPlan]:
    """Let the layers of a group share ``down`` where all of them were given the same rank."""
    found = {layer.name: layer for layer in layers}
    for group in groups:
        members = [found[name] for name in group.names]
        rank = members[0].rank
        if rank is not None and all(layer.rank == rank for layer in members):
            found.update({layer.name: layer for layer in sharing(members, rank, "as asked")})
    return list(found.values())


def _sharing_within_error(
    draft: Plan,
    layers: list[LayerPlan],
    budget: Budget,
    groups: Sequence[Group],
    round_to: int,
    tolerance: float,
) -> list[LayerPlan]:
    """Let the layers of a group share ``down`` where keeping the bound then takes fewer parameters."""
    found = {layer.name: layer for layer in layers}
    bound = _error_bound(budget) / (1 + tolerance)
    for group in groups:
        taken: set[str] = set()
        for names, joint in sorted(group.joint.items(), key=lambda item: -len(item[0])):
            needed = max(error_curve.smallest_rank(bound) for error_curve in joint)
            rank = -(-needed // round_to) * round_to
            small = sharing([draft[name] for name in names], rank, f"{budget} needs rank {needed}")
            fewer = sum(x.parameters for x in small) < sum(found[name].parameters for name in names)
            if fewer and taken.isdisjoint(names):
                found.update({layer.name: layer for layer in small})
                taken.update(names)
    return list(found.values())


def _joint_error_curves(layers: Sequence[LayerPlan], groups: Sequence[Group]) -> dict[str, ErrorCurve]:
    """Return the errors of the layers that share ``down``, with those that they share it with."""
    users: dict[str, list[str]] = {}
    for layer in layers:
        if layer.shares_down_with is not None:
            users.setdefault(layer.shares_down_with, [layer.shares_down_with]).append(layer.name)
    found = {}
    for names in map(tuple, users.values()):
        joint = next(group.joint[names] for group in groups if names in group.joint)
        found.update(dict(zip(names, joint, strict=bool(joint))))  # not known where no error was asked for
    return found


def _error_bound(budget: Budget) -> float:
    """Return the largest relative error that an ``error`` or ``energy`` budget allows."""
    return float(budget.value if budget.name == "error" else (1 - budget.value) ** 0.5)


def _candidates(
    draft: Plan,
    error_curves: Mapping[str, ErrorCurve],
    round_to: int,
    loss_per_square: Mapping[str, float] | None,
    costs: Costs | None,
    groups: Sequence[Group],
    quantization_losses: Errors,
    blocks: Sequence[Offer],
) -> list[list[tuple[Offer, ...]]]:
    """List what layers can become, priced: for each layer or group the ways to divide it, as candidates."""
    weighs = loss_per_square or {}
    scales = {
        x.name: importance(x, error_curves[x.name].squared_norm, weighs.get(x.name)) for x in draft.targeted
    }
    known = {(x.name,): (error_curves[x.name],) for x in draft.targeted}
    candidates: dict[tuple[str, ...], Candidates] = {}
    for names, errors in itertools.chain(known.items(), *(group.joint.items() for group in groups)):
        layers, sizes = [draft[name] for name in names], [scales[name] for name in names]
        offers = []
        for storage_format, quantization_loss in quantization_losses.items():
            if (storage_format.correction or storage_format.pivoted) and len(names) > 1:
                continue  # such factors are each layer's own
            if storage_format is not FLOAT and not all(name in quantization_loss for name in names):
                continue  # its rows are not whole groups
            each = [quantization_loss.get(name, QuantizationLoss()) for name in names]
            found = candidates_of(layers, errors, sizes, round_to, storage_format, each)
            offers.append(found if costs is None else found.priced(costs.price(found)))
        candidates[names] = merged(offers) if len(offers) > 1 else offers[0]
    together = [tuple(layer.name for layer in block.layers) for block in blocks]
    grouped = {name for names in (*together, *(group.names for group in groups)) for name in names}
    alone = [(x.name,) for x in draft.targeted if x.name not in grouped]
    choices: list[list[tuple[Offer, ...]]] = [
        list(partitions(names, candidates)) for names in [*alone, *(group.names for group in groups)]
    ]
    for names, block in zip(together, blocks, strict=True):
        narrower = block if costs is None else block.priced(costs.price(block))
        choices.append([tuple(candidates[(name,)] for name in names), (narrower,)])
    return choices


def _by_keep(
    draft: Plan,
    keep: float,
    candidates: Sequence[Sequence[tuple[Offer, ...]]],
    allocation: str,
    round_to: int,
) -> list[tuple[Offer, int]]:
    total = sum(layer.dense_parameters for layer in draft.targeted)
    least = int(_least(candidates))
    if least > keep * total:
        nearest = math.floor(1000 * least / total + 1) / 1000
        advice = f"Use keep={nearest} or more, or a" if nearest < 1 else "Use a"
        raise BudgetError(
            f"keep={keep!r} leaves {keep * total:,.0f} of {total:,} parameters, but the smallest ranks "
            f"(multiples of {round_to}) need {least:,}. {advice} smaller round_to."
        )
    return _within(candidates, keep * total, allocation)


def _by_cost(
    draft: Plan,
    budget: Budget,
    candidates: Sequence[Sequence[tuple[Offer, ...]]],
    costs: Costs,
    allocation: str,
) -> list[tuple[Offer, int]]:
    """Allocate under a cost other than parameters."""
    limit = costs.limit - costs.fixed
    least = _least(candidates)
    if least > limit:
        nearest = costs.say(least + costs.fixed)
        raise BudgetError(
            f"{budget} cannot be met: with the smallest ranks on offer {draft.model} still needs "
            f"{nearest}. That is the least possible with these targets and this round_to."
        )
    return _within(candidates, limit, allocation)


def _least(candidates: Sequence[Sequence[tuple[Offer, ...]]]) -> float:
    """Return the cost of the cheapest choices."""
    return sum(
        min(sum(float(candidate_list.costs[0]) for candidate_list in parts) for parts in choices)
        for choices in candidates
    )


def _within(
    candidates: Sequence[Sequence[tuple[Offer, ...]]], limit: float, allocation: str
) -> list[tuple[Offer, int]]:
    parts = best_partitions(candidates, limit)
    points = uniform(parts, limit) if allocation == "uniform" else allocate(parts, limit)
    return list(zip(parts, points, strict=True))

"""Select ranks: spectra and a budget become a plan.

``keep`` is one constrained problem over all layers: minimise the sum of the layers' errors subject
to the parameters that may remain, with the dense weight (no error, all parameters) always among the
choices. The optimum of the Lagrangian lies on the lower convex hulls of the layers' error curves;
their segments, steepest first, are taken while they fit, and the rest is filled greedily.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowrank.errors import BudgetError, RankError, TargetError
from lowrank.linalg import Spectrum
from lowrank.patterns import is_wildcard, matches, no_match
from lowrank.planning import Budget, LayerPlan, Plan

ALLOCATIONS = ("global", "uniform")


def select(
    draft: Plan,
    budget: Budget,
    spectra: Mapping[str, Spectrum],
    *,
    allocation: str = "global",
    round_to: int = 8,
    named: Collection[str] = (),
    tolerance: float = 1e-3,
    loss_per_square: Mapping[str, float] | None = None,
    held_out_ratio: Mapping[str, float] | None = None,
    costs: Costs | None = None,
) -> Plan:
    """Give every targeted layer of ``draft`` a rank, or the reason why it stays dense.

    Args:
        draft: The layers, from `lowrank.targets.draft`.
        budget: What may remain. An explicit rank is taken exactly; others are rounded.
        spectra: The error at every rank, by layer name. With a ``rank`` budget nothing is decided by
            them, so they may be missing; the predicted errors are then missing too.
        allocation: For ``keep``: ``"global"`` minimises the sum over layers of the squared relative
            error times the layer's parameters; ``"uniform"`` keeps the same fraction of every layer.
        round_to: Chosen ranks are multiples of this, as matrix kernels like them.
        named: Layers that the user named without wildcards: a rank that is too large for one of
            them is an error, for others a reason to stay dense.
        tolerance: Relative excess over the optimal error that `apply` may have; the ranks for an
            ``error`` or ``energy`` leave room for it, so that the bound holds in the end.
        loss_per_square: Factor from each layer's squared error to the loss, where the metric is in
            units of the loss: errors of different layers are then compared as they are.
        held_out_ratio: By layer, squared errors on held-out tokens over the predicted ones.
        costs: The unit of a ``max_bytes`` or ``speedup`` budget.

    Raises:
        BudgetError: If no layer would change, or ``keep`` is below what the smallest ranks need.
        RankError: If a rank exceeds ``min(out, in)`` of a named layer.
        TargetError: If a pattern of a rank mapping matches no targeted layer.
    """
    if allocation not in ALLOCATIONS:
        raise BudgetError(f"allocation={allocation!r}: choose one of {', '.join(ALLOCATIONS)}.")
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise BudgetError(f"round_to={round_to!r}: ranks are rounded to a positive whole number.")
    if budget.kind == "rank":
        layers = _by_rank(draft, budget.value, named)
    elif budget.kind in ("energy", "error"):
        layers = _by_error(draft, budget, spectra, round_to, tolerance)
    else:
        curves = [_curve(x, spectra[x.name], round_to, loss_per_square) for x in draft.targeted]
        if costs is None:
            layers = _by_keep(draft, budget.value, curves, allocation, round_to)
        else:
            layers = _by_cost(draft, budget, curves, costs, allocation)
    chosen = {layer.name: _with_error(layer, spectra, loss_per_square, held_out_ratio) for layer in layers}
    plan = replace(draft, budget=str(budget), allocation=allocation, round_to=round_to, tolerance=tolerance)
    plan = plan.with_layers(chosen)
    if not any(layer.rank for layer in chosen.values()):
        raise BudgetError(_nothing_changes(plan, budget, spectra))
    return plan


def _with_error(
    layer: LayerPlan,
    spectra: Mapping[str, Spectrum],
    loss_per_square: Mapping[str, float] | None,
    held_out_ratio: Mapping[str, float] | None,
) -> LayerPlan:
    if layer.rank is None or layer.name not in spectra:
        return layer
    spectrum, rank = spectra[layer.name], layer.rank
    error = spectrum.relative_error(rank)
    held = held_out_ratio.get(layer.name) if held_out_ratio is not None else None
    return replace(
        layer,
        relative_error=error,
        held_out_error=None if held is None else error * math.sqrt(held),
        loss_increase=loss_per_square[layer.name] * spectrum.squared_error(rank) if loss_per_square else None,
    )


def _nothing_changes(plan: Plan, budget: Budget, spectra: Mapping[str, Spectrum]) -> str:
    lines = [f"With {budget}, no layer of {plan.model} would change."]
    reasons = dict.fromkeys((layer.reason, layer.targeted) for layer in plan)
    for reason, targeted in list(reasons)[:4]:
        example = next(layer.name for layer in plan if (layer.reason, layer.targeted) == (reason, targeted))
        lines.append(f"  {example}: {reason}")
    if not plan.layers:
        advice = "It has no linear layer."
    elif plan.targeted:
        advice = _LESS[budget.kind] + _nearest(plan, budget, spectra)
    elif plan.factorized:
        advice = "Call decompress(model) first, or start from the dense checkpoint."
    else:
        advice = "Name other layers with targets=[...]."
    return "\n".join([*lines, f"  {advice}"])


def _nearest(plan: Plan, budget: Budget, spectra: Mapping[str, Spectrum]) -> str:
    """Name the first budget at which a layer would change."""
    ranks = {
        layer.name: layer.largest_paying_rank // plan.round_to * plan.round_to for layer in plan.targeted
    }
    if budget.kind == "rank":
        largest = max(layer.largest_paying_rank for layer in plan.targeted)
        return f" The largest that saves parameters is {largest}." if largest else ""
    if budget.kind not in ("error", "energy"):
        return ""
    errors = {name: spectra[name].relative_error(rank) for name, rank in ranks.items() if rank}
    if not errors:
        return ""
    name = min(errors, key=errors.__getitem__)
    error = errors[name] * (1 + plan.tolerance)
    if budget.kind == "error":
        return f" From error={math.ceil(1000 * error) / 1000} on, {name} would change."
    return f" From energy={math.floor(1000 * (1 - error**2)) / 1000} down, {name} would change."


_LESS = {
    "rank": "Use a smaller rank.",
    "keep": "Keep less.",
    "energy": "Retain less energy.",
    "error": "Allow a larger error.",
    "max_bytes": "Allow fewer bytes.",
    "speedup": "Ask for more.",
}


def _by_rank(draft: Plan, ranks: int | Mapping[str, int], named: Collection[str]) -> list[LayerPlan]:
    patterns = ranks if isinstance(ranks, Mapping) else {"*": ranks}
    named = {*named, *(p for p in patterns if not is_wildcard(p))}
    for pattern in patterns if isinstance(ranks, Mapping) else ():
        if not any(matches(layer.name, pattern) for layer in draft.targeted):
            untouched = next((x for x in draft if matches(x.name, pattern)), None)
            if untouched is not None:
                raise TargetError(f'"{pattern}": {untouched.name} is not a target: {untouched.reason}.')
            raise no_match(pattern, [x.name for x in draft.targeted], "targeted layers")
    layers = []
    for layer in draft.targeted:
        given = [rank for pattern, rank in patterns.items() if matches(layer.name, pattern)]
        layers.append(_at_rank(layer, given[-1] if given else None, layer.name in named))
    return layers


def _at_rank(layer: LayerPlan, rank: int | None, named: bool) -> LayerPlan:
    if rank is None:
        return layer.dense("no pattern of the rank mapping names it")
    largest = min(layer.in_features, layer.out_features)
    if rank > largest and named:
        raise RankError(
            f"{layer.name}: rank {rank} is above min(out, in) = {largest} of the weight "
            f"(out={layer.out_features}, in={layer.in_features}). Ranks that save parameters go up "
            f"to {layer.largest_paying_rank}."
        )
    if rank > layer.largest_paying_rank:
        return layer.dense(
            f"rank {rank} would not save parameters (the largest that does: {layer.largest_paying_rank})"
        )
    return replace(layer, rank=rank, reason="as asked")


def _by_error(
    draft: Plan, budget: Budget, spectra: Mapping[str, Spectrum], round_to: int, tolerance: float
) -> list[LayerPlan]:
    bound = budget.value if budget.kind == "error" else (1 - budget.value) ** 0.5
    layers = []
    for layer in draft.targeted:
        needed = spectra[layer.name].smallest_rank(bound / (1 + tolerance))
        rank = -(-needed // round_to) * round_to
        if rank > layer.largest_paying_rank:
            rounded = f", rounded to {rank}" if rank != needed else ""
            layers.append(
                layer.dense(f"{budget} needs rank {needed}{rounded}, which would not save parameters")
            )
        else:
            layers.append(replace(layer, rank=rank, reason=f"{budget} needs rank {needed}"))
    return layers


def _by_keep(
    draft: Plan, keep: float, curves: list[Curve], allocation: str, round_to: int
) -> list[LayerPlan]:
    total = sum(layer.dense_parameters for layer in draft.targeted)
    least = sum(int(curve.costs[0]) for curve in curves)
    if least > keep * total:
        nearest = math.floor(1000 * least / total + 1) / 1000
        advice = f"Use keep={nearest} or more, or a" if nearest < 1 else "Use a"
        raise BudgetError(
            f"keep={keep!r} leaves {keep * total:,.0f} of {total:,} parameters, but the smallest ranks "
            f"(multiples of {round_to}) need {least:,}. {advice} smaller round_to."
        )
    return _within(draft, curves, keep * total, allocation)


def _by_cost(
    draft: Plan, budget: Budget, curves: list[Curve], costs: Costs, allocation: str
) -> list[LayerPlan]:
    """Allocate under a cost other than parameters."""
    priced = [costs.price(layer, curve) for layer, curve in zip(draft.targeted, curves, strict=True)]
    limit = costs.limit - costs.fixed
    least = sum(float(curve.costs[0]) for curve in priced)
    if least > limit:
        nearest = costs.say(least + costs.fixed)
        raise BudgetError(
            f"{budget} cannot be met: with the smallest ranks on offer {draft.model} still needs "
            f"{nearest}. That is the least possible with these targets and this round_to."
        )
    return _within(draft, priced, limit, allocation)


def _within(draft: Plan, curves: list[Curve], limit: float, allocation: str) -> list[LayerPlan]:
    choices = _uniform(curves, limit) if allocation == "uniform" else allocate(curves, limit)
    return [
        _chosen(layer, curve, choice)
        for layer, curve, choice in zip(draft.targeted, curves, choices, strict=True)
    ]


def _chosen(layer: LayerPlan, curve: Curve, choice: int) -> LayerPlan:
    if choice == len(curve.ranks):
        small = not len(curve.ranks)
        return layer.dense("too small: no rank saves parameters" if small else "worth its parameters")
    return replace(layer, rank=int(curve.ranks[choice]), reason="chosen by the allocator")


@dataclass(frozen=True)
class Costs:
    """What layers cost in a unit other than parameters.

    Args:
        limit: What the whole model may cost.
        fixed: What everything but the targeted weights costs.
        price: Returns a layer's curve with its costs in this unit.
        say: Puts a cost into words.
    """

    limit: float
    fixed: float
    price: Callable[[LayerPlan, Curve], Curve]
    say: Callable[[float], str]


@dataclass(frozen=True)
class Curve:
    """The choices for one layer, cheapest first; the last one is the dense weight.

    Args:
        ranks: The ranks on offer, ``(choices − 1,)``.
        costs: Parameters of each choice, ``(choices,)``, increasing.
        losses: Error of each choice, ``(choices,)``, decreasing to 0.
    """

    ranks: np.ndarray[Any, Any]
    costs: np.ndarray[Any, Any]
    losses: np.ndarray[Any, Any]


def _curve(
    layer: LayerPlan, spectrum: Spectrum, round_to: int, loss_per_square: Mapping[str, float] | None
) -> Curve:
    ranks = np.arange(round_to, layer.largest_paying_rank + 1, round_to)
    tail = spectrum.tail.numpy()
    if loss_per_square is not None:
        scale = loss_per_square[layer.name] * spectrum.scale**2
    else:
        # Squared error with each weight scaled to unit mean square. Absolute errors would follow the
        # arbitrary scale of a layer, and relative ones alone would count a small layer like a large one.
        scale = layer.dense_parameters / float(tail[0]) if tail[0] > 0 else 0.0
    losses = tail[ranks] * scale
    return Curve(
        ranks=ranks,
        costs=np.append(ranks * (layer.in_features + layer.out_features), layer.dense_parameters),
        losses=np.append(losses, 0.0),
    )


def _uniform(curves: list[Curve], budget: float) -> list[int]:
    """Keep the same fraction of every layer; less than the budget's where small layers need more."""
    keep = min(1.0, budget / sum(float(curve.costs[-1]) for curve in curves))
    for fraction in np.linspace(keep, 0, 1000):  # at once, unless small layers take more than their share
        choices = [_largest_within(curve, fraction * curve.costs[-1]) for curve in curves]
        if sum(float(curve.costs[choice]) for curve, choice in zip(curves, choices, strict=True)) <= budget:
            return choices
    return [0] * len(curves)


def _largest_within(curve: Curve, cost: float) -> int:
    """Return the most expensive choice within ``cost``, or else the cheapest one."""
    return max(0, int(np.searchsorted(curve.costs, cost, side="right")) - 1)


def allocate(curves: list[Curve], budget: float) -> list[int]:
    """Choose one point of every curve so that the costs fit the budget and the losses are small.

    Args:
        curves: One per layer.
        budget: Largest sum of costs, at least the sum of the cheapest choices.

    Returns:
        The index of the choice on each curve. Where every segment fits exactly it is the optimum of
        the Lagrangian; what the last segments leave over is filled by the best gain per parameter.

    Source: Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
    """
    choices = [0] * len(curves)
    left = budget - sum(float(curve.costs[0]) for curve in curves)
    segments = [
        (slope, number, start, stop)
        for number, curve in enumerate(curves)
        for slope, start, stop in _hull_segments(curve)
    ]
    for _, number, start, stop in sorted(segments, key=lambda segment: -segment[0]):
        cost = float(curves[number].costs[stop] - curves[number].costs[start])
        if choices[number] == start and cost <= left:
            choices[number], left = stop, left - cost
    while True:
        steps = [_best_step(curve, choice, left) for curve, choice in zip(curves, choices, strict=True)]
        number = max(range(len(steps)), key=lambda i: steps[i][0], default=0)
        if not steps or steps[number][0] <= 0:
            return choices
        target = steps[number][1]
        left -= float(curves[number].costs[target] - curves[number].costs[choices[number]])
        choices[number] = target


def _hull_segments(curve: Curve) -> list[tuple[float, int, int]]:
    """Return ``(gain per parameter, start, stop)`` along the lower convex hull, steepest first."""
    hull: list[int] = []
    for point in range(len(curve.costs)):
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) <= _slope(curve, hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(_slope(curve, a, b), a, b) for a, b in itertools.pairwise(hull)]


def _slope(curve: Curve, start: int, stop: int) -> float:
    gain = curve.losses[start] - curve.losses[stop]
    return float(gain / (curve.costs[stop] - curve.costs[start]))


def _best_step(curve: Curve, choice: int, left: float) -> tuple[float, int]:
    """Return the best gain per parameter within ``left``, and the choice that it leads to."""
    extra = curve.costs[choice + 1 :] - curve.costs[choice]
    extra = extra[extra <= left]
    if not len(extra):
        return 0.0, choice
    gains = (curve.losses[choice] - curve.losses[choice + 1 : choice + 1 + len(extra)]) / extra
    best = int(np.argmax(gains))
    return float(gains[best]), choice + 1 + best

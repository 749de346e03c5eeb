"""One constrained problem over many curves: minimise the sum of the losses within a sum of costs.

The optimum of the Lagrangian lies on the lower convex hulls of the curves; their segments, steepest
first, are taken while they fit, and the rest is filled greedily. Nothing here knows layers or ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Choices, cheapest first; the last one leaves all as it is.

    Args:
        costs: Of each choice, ``(choices,)``, increasing.
        losses: Of each choice, ``(choices,)``, decreasing to 0.
    """

    costs: np.ndarray[Any, Any]
    losses: np.ndarray[Any, Any]


def uniform(curves: Sequence[Curve], budget: float) -> list[int]:
    """Keep the same fraction of every curve; less than the budget's where small ones need more."""
    keep = min(1.0, budget / sum(float(curve.costs[-1]) for curve in curves))
    for fraction in np.linspace(keep, 0, 1000):  # at once, unless small ones take more than their share
        choices = [_largest_within(curve, fraction * curve.costs[-1]) for curve in curves]
        if sum(float(curve.costs[choice]) for curve, choice in zip(curves, choices, strict=True)) <= budget:
            return choices
    return [0] * len(curves)


def _largest_within(curve: Curve, cost: float) -> int:
    """Return the most expensive choice within ``cost``, or else the cheapest one."""
    return max(0, int(np.searchsorted(curve.costs, cost, side="right")) - 1)


def allocate(curves: Sequence[Curve], budget: float) -> list[int]:
    """Choose one point of every curve so that the costs fit the budget and the losses are small.

    Args:
        curves: What there is to choose from.
        budget: Largest sum of costs, at least the sum of the cheapest choices.

    Returns:
        The index of the choice on each curve. Where every segment fits exactly it is the optimum of
        the Lagrangian; what the last segments leave over is filled by the best gain per cost.

    Source: Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
    """
    choices = [0] * len(curves)
    left = budget - sum(float(curve.costs[0]) for curve in curves)
    segments = [
        (slope, number, start, stop)
        for number, curve in enumerate(curves)
        for slope, start, stop in hull_segments(curve)
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


def hull_segments(curve: Curve) -> list[tuple[float, int, int]]:
    """Return ``(gain per cost, start, stop)`` along the lower convex hull, steepest first."""
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
    """Return the best gain per cost within ``left``, and the choice that it leads to."""
    extra = curve.costs[choice + 1 :] - curve.costs[choice]
    extra = extra[extra <= left]
    if not len(extra):
        return 0.0, choice
    gains = (curve.losses[choice] - curve.losses[choice + 1 : choice + 1 + len(extra)]) / extra
    best = int(np.argmax(gains))
    return float(gains[best]), choice + 1 + best

"""The Lagrangian over all layers, against brute force."""

import itertools

import numpy as np
import pytest
from closeness import SUMS64
from hypothesis import given
from hypothesis import strategies as st

from lowrank.allocation.solver import Curve, allocate


@st.composite
def convex_curves(draw: st.DrawFn, equal_costs: bool = False) -> list[Curve]:
    """Up to four curves of up to six choices, each step gaining less per parameter than the last."""
    curves = []
    for _ in range(draw(st.integers(1, 4))):
        steps = draw(st.integers(0, 5))
        gaps = (
            [10] * steps
            if equal_costs
            else draw(st.lists(st.integers(1, 30), min_size=steps, max_size=steps))
        )
        slopes = draw(st.lists(st.floats(0.01, 10), min_size=steps, max_size=steps))
        gains = np.array(sorted(slopes, reverse=True)) * gaps
        start = draw(st.integers(1, 20))
        curves.append(
            Curve(
                costs=start + np.concatenate([[0], np.cumsum(gaps)]).astype(int),
                losses=np.append(np.cumsum(gains[::-1])[::-1], 0.0),
            )
        )
    return curves


def totals(curves: list[Curve], choices: tuple[int, ...] | list[int]) -> tuple[float, float]:
    pairs = list(zip(curves, choices, strict=True))
    return sum(float(c.costs[i]) for c, i in pairs), sum(float(c.losses[i]) for c, i in pairs)


def brute_force(curves: list[Curve], budget: float) -> float:
    every = itertools.product(*[range(len(curve.costs)) for curve in curves])
    results = [totals(curves, choices) for choices in every]
    return min(loss for cost, loss in results if cost <= budget)


def budget_within(curves: list[Curve], share: float) -> float:
    least, most = totals(curves, [0] * len(curves))[0], sum(float(c.costs[-1]) for c in curves)
    return least + share * (most - least)


@given(curves=convex_curves(), share=st.floats(0, 1))
def test_on_convex_curves_the_loss_is_within_one_step_of_the_optimum(curves, share):
    budget = budget_within(curves, share)
    cost, loss = totals(curves, allocate(curves, budget))
    step = max((float(-np.diff(c.losses).min()) for c in curves if len(c.losses) > 1), default=0.0)
    assert cost <= budget
    assert loss <= brute_force(curves, budget) + step + 1e-9


@given(curves=convex_curves(equal_costs=True), share=st.floats(0, 1))
def test_where_every_step_costs_the_same_the_optimum_is_found(curves, share):
    budget = budget_within(curves, share)
    _, loss = totals(curves, allocate(curves, budget))
    assert loss == pytest.approx(brute_force(curves, budget), rel=SUMS64, abs=SUMS64)


@given(
    data=st.data(),
    share=st.floats(0, 1),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_on_any_curves_the_budget_holds_and_no_step_that_fits_is_left(data, share, sizes):
    curves = []
    for size in sizes:
        gaps = data.draw(st.lists(st.integers(1, 30), min_size=size, max_size=size))
        losses = data.draw(st.lists(st.floats(0.01, 100), min_size=size, max_size=size, unique=True))
        losses = np.array([*sorted(losses, reverse=True)[:-1], 0.0])
        curves.append(Curve(np.cumsum(gaps), losses))
    budget = budget_within(curves, share)
    choices = allocate(curves, budget)
    cost, loss = totals(curves, choices)
    assert cost <= budget
    for number, choice in enumerate(choices):
        for better in range(choice + 1, sizes[number]):
            other = totals(curves, [better if i == number else c for i, c in enumerate(choices)])
            assert other[0] > budget or other[1] >= loss


def test_an_empty_problem_has_an_empty_answer():
    assert allocate([], 10) == []

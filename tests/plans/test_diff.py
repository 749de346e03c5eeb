"""How two plans differ."""

import dataclasses

from hypothesis import given
from plan_data import PLAN, plans

from lowrank.plans.layer_plan import LayerPlan


def test_diff_lists_what_changed_in_rank_and_what_one_side_lacks():
    other = PLAN.with_rank("encoder.0.query", 8).with_rank("encoder.1.query", None)
    other = dataclasses.replace(other, layers=(*other.layers[:3], LayerPlan("new", "linear", 8, 8, True, 2)))
    assert [str(change) for change in PLAN.diff(other)] == [
        "encoder.0.query: rank 16 → rank 8",
        "encoder.1.query: rank 24 → dense",
        "pooler.dense: dense → absent",
        "new: absent → rank 2",
    ]


@given(plans)
def test_a_plan_does_not_differ_from_itself(plan):
    assert plan.diff(plan) == []


@given(plans, plans)
def test_a_difference_looks_the_same_from_both_sides(one, other):
    there = {(c.name, c.before, c.after) for c in one.diff(other)}
    back = {(c.name, c.after, c.before) for c in other.diff(one)}
    assert there == back

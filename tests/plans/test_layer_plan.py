"""A layer of a plan: its break-even rank, and what it refuses to be."""

import pytest
from hypothesis import given
from plan_data import layer_plans

from lowrank.errors import RankError
from lowrank.plans.layer_plan import LayerPlan


@given(layer_plans)
def test_the_largest_paying_rank_pays_and_the_next_does_not(layer):
    largest = layer.break_even_rank
    assert layer.parameters_at(largest) < layer.dense_parameters <= layer.parameters_at(largest + 1)


@pytest.mark.parametrize("rank", [0, -2, 8.0, True, "8"], ids=repr)
def test_a_layer_plan_with_a_rank_that_is_no_positive_integer_cannot_be_made(rank):
    with pytest.raises(RankError, match=r"^encoder\.query: "):
        LayerPlan("encoder.query", "linear", 64, 64, bias=True, rank=rank)

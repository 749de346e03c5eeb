"""How much of a model a plan can change is data of the plan, checked when it is read."""

import pytest
from unplanned_models import mixtral

import lowrank
from lowrank import Plan, PlanError
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.reach import UnplannedWeight


def test_a_plan_goes_through_json_with_it_and_one_of_before_is_read():
    plan = lowrank.plan(mixtral(), rank=8)
    assert Plan.from_json(plan.to_json()) == plan
    data = plan.to_dict()
    del data["model_parameters"], data["unplanned"]
    old = Plan.from_dict(data)
    assert (old.model_parameters, old.unplanned, old.reachable_fraction) == (None, (), 1.0)
    assert str(old).startswith("layer")
    assert old.diff(plan) == []
    assert plan.with_rank("*.q_proj", 4).unplanned == plan.unplanned


WEIGHT = {"name": "w", "shape": [2, 3], "parameters": 6, "reason": "why", "tensors": 1}


@pytest.mark.parametrize(
    ("unplanned", "message"),
    [
        ({}, '"unplanned" are no list'),
        ([3], 'unplanned weight without a "name"'),
        ([{"name": "w"}], "w: the plan lacks parameters, reason, shape"),
        ([WEIGHT | {"shape": "2x3"}], "w: \"shape\" is '2x3', but must be a list of whole numbers"),
        ([WEIGHT | {"shape": [2.0]}], "but must be a list of whole numbers"),
        ([WEIGHT | {"parameters": "6"}], "w: \"parameters\" is '6', but must be int"),
        ([WEIGHT | {"color": "red"}], 'w has an unknown field "color"'),
    ],
    ids=["no-list", "number", "lacks", "shape-text", "shape-float", "parameters-text", "unknown"],
)
def test_a_damaged_entry_is_refused_with_its_name(unplanned, message):
    data = Plan("Model").to_dict() | {"unplanned": unplanned}
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)


def test_a_plan_s_entries_must_be_of_their_class():
    with pytest.raises(PlanError, match="unplanned"):
        Plan("Model", unplanned=[LayerPlan("a", "linear", 2, 2, True)])
    assert Plan("Model", unplanned=[UnplannedWeight("w", (2, 3), 6, "why")]).unplanned[0].tensors == 1

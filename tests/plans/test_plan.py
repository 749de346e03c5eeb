"""A plan is plain data: frozen, edited by hand, and refused where it contradicts itself."""

import ast
import dataclasses
import sys
from pathlib import Path

import pytest
from plan_data import LAYERS, PLAN

from lowrank.config import Budget
from lowrank.errors import CheckpointError, LowRankError, PlanError, RankError, TargetError
from lowrank.plans import plan as plan_module
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan


def test_with_rank_changes_the_matching_layers_and_nothing_else():
    plan = PLAN.with_rank("*.query", 12)
    assert [layer.rank for layer in plan] == [12, None, 12, None]
    assert plan["encoder.0.query"].reason == "set by hand"
    assert plan["encoder.0.query"].relative_error is None  # the old prediction no longer holds
    assert plan["encoder.0.value"] == PLAN["encoder.0.value"]
    assert [layer.rank for layer in PLAN] == [16, None, 24, None]


def test_with_rank_passes_over_layers_without_elements():
    layers = LayerPlan("a", "linear", 64, 64, bias=True), LayerPlan("b", "linear", 64, 0, bias=True)
    edited = Plan("Model", layers).with_rank("*", 4)
    assert (edited["a"].rank, edited["b"].rank) == (4, None)
    assert Plan.from_json(edited.to_json()) == edited
    with pytest.raises(TargetError, match="b: the layers that it matches have no elements"):
        edited.with_rank("b", 4)


def test_with_rank_none_leaves_a_layer_dense():
    layer = PLAN.with_rank("encoder.0.query", None)["encoder.0.query"]
    assert (layer.rank, layer.relative_error, layer.reason) == (None, None, "left dense by hand")


def test_with_rank_refuses_a_pattern_without_layers_and_a_rank_that_is_none():
    with pytest.raises(TargetError, match=r'"\*\.quary" matches none of the 4 layers'):
        PLAN.with_rank("*.quary", 8)
    with pytest.raises(RankError, match=r"\*\.query: 0 is not positive"):
        PLAN.with_rank("*.query", 0)


def test_a_plan_is_frozen_in_every_part():
    for thing, field in [(PLAN, "model"), (LAYERS[0], "rank"), (Budget.of(rank=8), "value")]:
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
            setattr(thing, field, None)
    assert isinstance(Plan("M", list(LAYERS)).layers, tuple)


def test_a_plan_answers_by_name_and_names_what_it_lacks():
    assert "pooler.dense" in PLAN
    assert "pooler" not in PLAN
    assert len(PLAN) == 4
    with pytest.raises(PlanError, match="nowhere: the plan for BertModel has no such layer") as caught:
        PLAN["nowhere"]
    assert isinstance(caught.value, LowRankError)


def test_a_plan_is_plain_data_that_needs_no_other_package():
    imported = set()
    for node in ast.walk(ast.parse(Path(plan_module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.split(".")[:2][-1] for name in foreign} <= {
        "arguments",
        "config",
        "errors",
        "files",
        "plans",
    }


def test_a_plan_under_an_unknown_metric_is_refused():
    data = Plan("Model").to_dict() | {"metric": "taste"}
    with pytest.raises(PlanError, match="under the metric 'taste', which is unknown here"):
        Plan.from_dict(data)


def test_a_plan_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"plan\.json: cannot be written"):
        Plan("Model").save(tmp_path / "missing" / "plan.json")

"""Budgets and plans are plain data: frozen, printable, editable, and JSON in both directions."""

import ast
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config import Budget
from lowrank.errors import BudgetError, CheckpointError, LowRankError, PlanError, RankError, TargetError
from lowrank.plans import plan as plan_module
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan
from lowrank.plans.plan_json import PLAN_FORMAT

LAYERS = (
    LayerPlan("encoder.0.query", "linear", 64, 64, True, 16, 0.25, "as asked"),
    LayerPlan("encoder.0.value", "linear", 64, 64, True, None, None, "worth its parameters"),
    LayerPlan("encoder.1.query", "linear", 64, 128, False, 24, 0.5, "as asked"),
    LayerPlan("pooler.dense", "linear", 64, 64, True, None, None, "part of a head (pooler)", False),
)
PLAN = Plan("BertModel", LAYERS, "rank={'*.query': 16}")

ranks = st.none() | st.integers(1, 10**6)
errors = st.none() | st.floats(0, 1)
layer_plans = st.builds(
    LayerPlan,
    name=st.text(min_size=1, max_size=20),
    layer_type=st.sampled_from(["linear", "conv1d", "MyLinear"]),
    in_features=st.integers(1, 10**6),
    out_features=st.integers(1, 10**6),
    bias=st.booleans(),
    rank=ranks,
    relative_error=errors,
    reason=st.text(max_size=30),
    targeted=st.booleans(),
)
plans = st.builds(
    Plan,
    model=st.text(max_size=20),
    layers=st.lists(layer_plans, max_size=5, unique_by=lambda layer: layer.name).map(tuple),
    budget=st.text(max_size=20),
    metric=st.just("weight"),
    allocation=st.sampled_from(["global", "uniform"]),
    round_to=st.integers(1, 64),
)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({}, "exactly one budget of rank, keep, energy, error, max_bytes, speedup; got none"),
        ({"rank": None, "keep": None}, "got none"),
        ({"rank": 8, "keep": 0.5}, "got rank=8 and keep=0.5"),
        ({"fraction": 0.5}, "Unknown budget 'fraction'"),
        ({"rank": {}}, "the mapping is empty"),
        ({"rank": {3: 8}}, "rank={3: …}: a key is a name pattern"),
    ],
    ids=["none", "all-none", "two", "unknown", "empty-mapping", "key-not-text"],
)
def test_a_malformed_budget_is_refused_with_what_was_given(kinds, message):
    with pytest.raises(BudgetError, match=message.replace("{", r"\{").replace("}", r"\}")):
        Budget.of(**kinds)


@pytest.mark.parametrize("kind", ["keep", "energy", "error"])
@pytest.mark.parametrize(
    "value", [0, 1, 0.0, 1.0, -0.5, 1.5, math.nan, math.inf, True, "0.5", [0.5]], ids=repr
)
def test_a_fraction_lies_strictly_between_zero_and_one(kind, value):
    with pytest.raises(BudgetError, match=f"{kind} is the .* strictly between 0 and 1"):
        Budget.of(**{kind: value})


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank: 0 is not positive"),
        (-3, "rank: -3 is not positive"),
        (2.0, "rank: a rank is a whole number, not 2.0"),
        (True, "rank: a rank is a whole number, not True"),
        ("8", "rank: a rank is a whole number, not '8'"),
        ({"*.query": 8, "*.key": 0}, r"\*\.key: 0 is not positive"),
        ({"*.query": 1.5}, r"\*\.query: a rank is a whole number, not 1.5"),
    ],
    ids=["zero", "negative", "float", "bool", "text", "mapping-zero", "mapping-float"],
)
def test_a_rank_is_a_positive_whole_number(rank, message):
    with pytest.raises(RankError, match=message):
        Budget.of(rank=rank)


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ({"rank": 8}, "rank=8"),
        ({"keep": 0.5}, "keep=0.5"),
        ({"rank": {"*": 8}, "keep": None}, "rank={'*': 8}"),
    ],
    ids=["rank", "keep", "mapping"],
)
def test_a_budget_reads_as_it_was_written(kinds, text):
    assert str(Budget.of(**kinds)) == text


@given(plans)
def test_json_gives_the_same_plan_back(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(plan.to_dict()) == plan


@given(plans)
def test_json_is_standard_json_with_the_format_first(plan):
    data = json.loads(plan.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert next(iter(data.items())) == ("format", PLAN_FORMAT)
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in plan]


def test_a_plan_survives_a_file(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.json: the plan cannot be read"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"bytes\.json: the plan cannot be read"):
        Plan.load(tmp_path / "bytes.json")


def edited(**changes: object) -> dict:
    return {**PLAN.to_dict(), **changes}


def edited_layer(without: str = "", **changes: object) -> dict:
    layer = {**PLAN.to_dict()["layers"][0], **changes}
    layer.pop(without, None)
    return edited(layers=[layer])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "A plan is a JSON object, not list"),
        ({"layers": []}, 'has no "format" number'),
        (edited(format="1"), 'has no "format" number'),
        (
            edited(format=PLAN_FORMAT + 1),
            f"has format {PLAN_FORMAT + 1}.*reads {PLAN_FORMAT}.*newer lowrank",
        ),
        (edited(layers=None), 'no list of "layers"'),
        (edited(layers=[3]), 'a layer without a "name"'),
        ({"format": PLAN_FORMAT, "layers": []}, 'does not say which "model"'),
        (edited(model=3), 'The plan: "model" is 3, but must be str'),
        (edited(round_to="8"), "The plan: \"round_to\" is '8', but must be int"),
        (edited(round_to=True), 'The plan: "round_to" is True, but must be int'),
        (edited(author="me"), 'The plan has an unknown field "author"'),
        (edited(layers=PLAN.to_dict()["layers"][:1] * 2), "encoder.0.query: the plan lists this layer twice"),
        (edited_layer(rnak=8), 'encoder.0.query has an unknown field "rnak"'),
        (edited_layer(rank="16"), "encoder.0.query: \"rank\" is '16', but must be int | None"),
        (edited_layer(rank=16.0), 'encoder.0.query: "rank" is 16.0, but must be int | None'),
        (edited_layer(rank=True), 'encoder.0.query: "rank" is True, but must be int | None'),
        (edited_layer(bias=1), 'encoder.0.query: "bias" is 1, but must be bool'),
        (edited_layer(in_features=0), "encoder.0.query: in_features and out_features must be positive"),
        (edited_layer(without="layer_type"), "encoder.0.query: the plan lacks layer_type"),
        (edited_layer(without="name"), 'a layer without a "name"'),
    ],
    ids=[
        "not-a-dict", "no-format", "format-text", "newer-format", "no-layers", "layer-not-a-dict", "no-model",
        "model-number", "round_to-text", "round_to-bool", "unknown-field", "layer-twice",
        "layer-unknown-field", "rank-text", "rank-float", "rank-bool", "bias-number",
        "no-inputs", "no-kind", "no-name",
    ],
)  # fmt: skip
def test_a_damaged_plan_is_refused_with_the_field(data, message):
    with pytest.raises(PlanError, match=message.replace("|", r"\|")):
        Plan.from_json(json.dumps(data))


def test_a_rank_of_zero_in_the_file_names_its_layer():
    with pytest.raises(RankError, match=r"encoder\.0\.query: 0 is not positive"):
        Plan.from_dict(edited_layer(rank=0))


@pytest.mark.parametrize("error", ["NaN", "Infinity", "-Infinity"])
def test_an_error_that_is_no_number_is_refused_when_read(error):
    text = PLAN.to_json().replace("0.25", error)
    with pytest.raises(PlanError, match=r"encoder\.0\.query"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "rank: 8", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}"],
    ids=["empty", "cut-off", "yaml", "too-deep", "too-long-a-number"],
)
def test_what_is_not_json_is_a_plan_error(text):
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json(text)


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


def test_the_table_says_every_rank_reason_and_the_total():
    text = str(PLAN)
    rows = {line.split()[0]: line for line in text.splitlines() if line and not line.startswith("─")}
    for layer in PLAN:
        assert layer.reason in rows[layer.name]
        assert f"{layer.out_features}×{layer.in_features}" in rows[layer.name]
    assert " 16 " in rows["encoder.0.query"]
    assert " 50%  0.2500 " in rows["encoder.0.query"]  # 16 · (64 + 64) of 64 · 64
    assert " dense " in rows["encoder.0.value"]
    # 16 · 128 + 64 · 64 + 24 · 192 parameters of 64 · 64 + 64 · 64 + 64 · 128; the head does not count.
    assert text.endswith(
        "BertModel, rank={'*.query': 16}: 2 of 4 linear layers factorized; "
        "10,752 of 16,384 targeted parameters remain (65.6%)."
    )


@given(layer_plans)
def test_the_largest_paying_rank_pays_and_the_next_does_not(layer):
    largest = layer.break_even_rank
    assert layer.parameters_at(largest) < layer.dense_parameters <= layer.parameters_at(largest + 1)


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


@pytest.mark.parametrize("rank", [0, -2, 8.0, True, "8"], ids=repr)
def test_a_layer_plan_with_a_rank_that_is_no_positive_integer_cannot_be_made(rank):
    with pytest.raises(RankError, match=r"^encoder\.query: "):
        LayerPlan("encoder.query", "linear", 64, 64, bias=True, rank=rank)


def test_a_plan_under_an_unknown_metric_is_refused():
    data = Plan("Model").to_dict() | {"metric": "taste"}
    with pytest.raises(PlanError, match="under the metric 'taste', which is unknown here"):
        Plan.from_dict(data)


def test_a_plan_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"plan\.json: cannot be written"):
        Plan("Model").save(tmp_path / "missing" / "plan.json")


def test_whole_numbers_of_numpy_are_budgets():
    assert str(Budget.of(rank=np.int64(8))) == "rank=8"
    assert str(Budget.of(rank={"*": np.int32(8)})) == "rank={'*': 8}"
    assert str(Budget.of(max_bytes=np.int64(1000))) == "max_bytes=1000"


@pytest.mark.parametrize("kind", ["keep", "energy", "error", "speedup"])
def test_a_budget_too_large_for_a_float_is_refused(kind):
    with pytest.raises(BudgetError, match=f"{kind}=1000"):
        Budget(kind, 10**400)


@pytest.mark.parametrize("kind", ["pipe", "directory", "nested", "list"])
def test_a_file_that_is_no_plan_is_refused_by_name(kind, tmp_path):
    file = tmp_path / "plan.json"
    make = {
        "pipe": os.mkfifo,
        "directory": Path.mkdir,
        "nested": lambda p: p.write_text("[" * 100_000),
        "list": lambda p: p.write_text("[1]"),
    }
    make[kind](file)
    with pytest.raises(PlanError, match=re.escape(str(file))):
        Plan.load(file)

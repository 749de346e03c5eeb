"""The JSON of a plan: both directions, and what is damaged is refused with the field."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from plan_data import PLAN, edited, plans

from lowrank.errors import PlanError, RankError
from lowrank.plans.plan import Plan
from lowrank.plans.plan_json import PLAN_FORMAT


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

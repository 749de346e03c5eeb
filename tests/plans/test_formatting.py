"""Tables and numbers for people, and JSON for programs."""

import json

import pytest

from lowrank.plans.formatting import to_json


def test_json_has_null_where_a_number_is_not_finite():
    text = to_json({"a": [float("nan"), 1.0], "b": {"c": float("-inf")}, "d": (2, "NaN", True)})
    wanted = {"a": [None, 1.0], "b": {"c": None}, "d": [2, "NaN", True]}
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == wanted

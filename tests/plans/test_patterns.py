"""Patterns on module names."""

import re

import pytest

from lowrank.errors import TargetError
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft


@pytest.mark.parametrize("argument", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("pattern", "closest"),
    [
        ("*.qurey", "encoder.layer.0.attention.self.query"),
        ("pooler.dens", "pooler.dense"),
        ("encoder.layer.1.intermediate.dence", "encoder.layer.1.intermediate.dense"),
    ],
    ids=["wildcard", "short", "long"],
)
def test_a_pattern_that_matches_nothing_names_the_closest(tiny_bert, argument, pattern, closest):
    told = (
        f'"{pattern}" matches none of the 16 linear layers and embeddings of BertModel.\n  Closest: {closest}'
    )
    with pytest.raises(TargetError, match=f"^{re.escape(told)}"):
        draft(Inspection(tiny_bert), **{argument: [pattern]})


@pytest.mark.parametrize("argument", ["targets", "ignore"])
@pytest.mark.parametrize("value", ["*.query", [1], 5, [None]], ids=["text", "numbers", "number", "none"])
def test_patterns_come_as_a_list_of_texts(tiny_bert, argument, value):
    with pytest.raises(
        TargetError, match=rf"{argument}=.*: give a list of patterns, such as \['\*\.query'\]"
    ):
        draft(Inspection(tiny_bert), **{argument: value})

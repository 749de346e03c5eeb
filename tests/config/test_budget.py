"""A budget is one of six, a number of its kind, or a rank for each pattern."""

import math

import numpy as np
import pytest

from lowrank.config import Budget
from lowrank.errors import BudgetError, RankError


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


def test_whole_numbers_of_numpy_are_budgets():
    assert str(Budget.of(rank=np.int64(8))) == "rank=8"
    assert str(Budget.of(rank={"*": np.int32(8)})) == "rank={'*': 8}"
    assert str(Budget.of(max_bytes=np.int64(1000))) == "max_bytes=1000"


@pytest.mark.parametrize("kind", ["keep", "energy", "error", "speedup"])
def test_a_budget_too_large_for_a_float_is_refused(kind):
    with pytest.raises(BudgetError, match=f"{kind}=1000"):
        Budget(kind, 10**400)

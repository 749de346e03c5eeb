"""Fields of strangers are checked by the types that their dataclass declares."""

import dataclasses
import math
import re

import pytest

from lowrank import PlanError
from lowrank.arguments import LARGEST
from lowrank.plans.fields import check_fields, quoted


@dataclasses.dataclass
class Entry:
    name: "str"
    count: "int | None" = None
    share: "float" = 0.0
    kept: "bool" = False
    parts: "list[str]" = dataclasses.field(default_factory=list)  # which JSON holds in another form


@pytest.mark.parametrize(
    "values",
    [{}, {"name": "x"}, {"count": None}, {"count": -LARGEST}, {"share": 1}, {"share": 0.5}, {"kept": True}],
    ids=str,
)
def test_what_fits_is_given_back(values):
    assert check_fields(Entry, values, "here") is values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1}, 'here has an unknown field "size".'),
        ({"parts": []}, 'here has an unknown field "parts".'),
        ({"name": None}, 'here: "name" is None, but must be str.'),
        ({"count": 1.0}, 'here: "count" is 1.0, but must be int | None.'),
        ({"count": True}, 'here: "count" is True, but must be int | None.'),
        ({"share": True}, 'here: "share" is True, but must be float.'),
        ({"kept": 1}, 'here: "kept" is 1, but must be bool.'),
        ({"name": {"x": 1}}, 'here: "name" is a dict, but must be str.'),
        ({"share": math.nan}, 'here: "share" is nan, but must be a finite number.'),
        ({"share": -math.inf}, 'here: "share" is -inf, but must be a finite number.'),
        ({"count": LARGEST + 1}, f'here: "count" is {LARGEST + 1}, but nothing has more than {LARGEST:,}.'),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:30],
)
def test_what_does_not_fit_is_refused_with_its_field(values, message):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        check_fields(Entry, values, "here")


def test_a_value_of_any_size_is_quoted_in_few_letters():
    assert len(quoted("x" * 10**6)) == len(quoted(10**4000)) == 80
    assert quoted([1] * 10**6) == "a list"

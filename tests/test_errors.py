"""One family of errors, and warnings at the line of the user."""

import inspect
import types
import warnings
from pathlib import Path

import pytest

import lowrank
from lowrank import errors
from lowrank.errors import LowRankError, ReachWarning, warn

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.__name__.endswith("Error")])
def test_an_error_is_a_lowrank_error_and_public(cls):
    assert issubclass(cls, LowRankError)
    assert getattr(lowrank, cls.__name__) is cls


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.__name__.endswith("Warning")])
def test_a_warning_is_shown_by_default_and_public(cls):
    assert issubclass(cls, UserWarning)
    assert getattr(lowrank, cls.__name__) is cls


def test_a_warning_names_the_line_outside_of_the_library():
    within = types.ModuleType("lowrank.somewhere")  # a file of the library that warns, two calls deep
    within.warn = warn
    code = "def inner(category):\n    warn('too few', category)\ndef outer(category):\n    inner(category)\n"
    exec(compile(code, "somewhere.py", "exec"), vars(within))
    with pytest.warns(ReachWarning, match=r"^too few$") as caught:
        within.outer(ReachWarning)
    assert caught[0].filename == __file__
    assert (
        Path(__file__).read_text().splitlines()[caught[0].lineno - 1].strip() == "within.outer(ReachWarning)"
    )


def test_a_warning_can_be_made_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReachWarning)
        with pytest.raises(ReachWarning, match=r"^little can change$"):
            warn("little can change", ReachWarning)

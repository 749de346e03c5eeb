"""Check what users pass: one function for each kind of argument, and a decorator that applies them by name.

This file uses the standard library only, but for devices.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Collection, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lowrank.errors import LowRankError

Check = Callable[[str, Any], Any]
"""Gets an argument's name and value; returns what the function is to get, or raises a `LowRankError`."""

P = ParamSpec("P")
R = TypeVar("R")

LARGEST = 2**31 - 1
"""The largest count or size that is accepted: a larger one is a mistake."""


def accepts(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that the arguments named in ``checks`` are checked before it begins."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        assert signature.parameters.keys() >= checks.keys()

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__qualname__}(): {error}") from None
            for name, value in bound.arguments.items():
                if name in checks:
                    bound.arguments[name] = checks[name](name, value)
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def refused(name: str, value: Any, wanted: str, error: type[LowRankError] = LowRankError) -> LowRankError:
    """Return the error for a ``value`` that is not what was ``wanted``."""
    text = repr(value) if isinstance(value, (str, bytes, Real, Path, type(None))) else type(value).__name__
    return error(f"{name}={text[:80]}: give {wanted}.")


def optional(check: Check) -> Check:
    """Accept ``None``, and else what ``check`` accepts."""
    return lambda name, value: None if value is None else check(name, value)


def is_whole(value: Any) -> bool:
    """Tell whether ``value`` is a whole number, numpy's included; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Tell whether ``value`` is a finite real number, numpy's included; truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and is_finite(value)


def whole(least: int = 0, most: int = LARGEST, error: type[LowRankError] = LowRankError) -> Check:
    """Accept whole numbers, numpy's too, from ``least`` to ``most``."""

    def check(name: str, value: Any) -> int:
        if not is_whole(value) or not least <= int(value) <= most:
            raise refused(name, value, f"a whole number from {least:,} to {most:,}", error)
        return int(value)

    return check


def number(
    least: float = -math.inf, *, above: float = -math.inf, error: type[LowRankError] = LowRankError
) -> Check:
    """Accept finite real numbers, numpy's too, of at least ``least`` and above ``above``."""

    def check(name: str, value: Any) -> float:
        if not is_real(value) or not value >= least or not value > above:
            bound = f" of at least {least:g}" if least > -math.inf else ""
            bound = f" above {above:g}" if above > -math.inf else bound
            raise refused(name, value, f"a finite number{bound}", error)
        return float(value)

    return check


def is_finite(value: Any) -> bool:
    """Tell whether a real number is neither NaN nor infinite, and small enough for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def flag(name: str, value: Any) -> bool:
    """Accept ``True`` and ``False``, and nothing that only counts as one of them."""
    if not isinstance(value, bool):
        raise refused(name, value, "True or False")
    return value


def text(error: type[LowRankError] = LowRankError) -> Check:
    """Accept strings."""
    return instance(str, "a string", error)


def choice(values: Collection[str], error: type[LowRankError] = LowRankError) -> Check:
    """Accept one of ``values``."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise refused(name, value, f"one of {', '.join(map(repr, values))}", error)
        return value

    return check


def path(error: type[LowRankError] = LowRankError) -> Check:
    """Accept a path as a string or as a `Path`; other objects that stand for a path become strings."""

    def check(name: str, value: Any) -> str | Path:
        given = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(given, str) or "\0" in given:
            raise refused(name, value, "a path, as a string or a pathlib.Path", error)
        return value if isinstance(value, Path) else given

    return check


def function(name: str, value: Any) -> Any:
    """Accept what can be called."""
    if not callable(value):
        raise refused(name, value, "a function, or another object that can be called")
    return value


def instance(kinds: type | tuple[type, ...], wanted: str, error: type[LowRankError] = LowRankError) -> Check:
    """Accept objects of the classes ``kinds``, which ``wanted`` describes."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kinds):
            raise refused(name, value, wanted, error)
        return value

    return check


def every(
    item: Check, kinds: tuple[type, ...], wanted: str, error: type[LowRankError] = LowRankError
) -> Check:
    """Accept a collection of the classes ``kinds`` of which ``item`` accepts each element."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kinds):
            raise refused(name, value, wanted, error)
        elements: Any = value
        for position, element in enumerate(elements):
            item(f"{name}[{position}]", element)
        return value

    return check


def patterns(error: type[LowRankError] = LowRankError, *, may_be_empty: bool = True) -> Check:
    """Accept ``None``, and lists of Unix-style patterns on module names."""

    def check(name: str, value: Any) -> Any:
        if value is None:
            return None
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        if not listed or not all(isinstance(pattern, str) for pattern in value):
            raise error(f"{name}={value!r}: give a list of patterns, such as ['*.query'].")
        if not value and not may_be_empty:
            raise error(f"{name}=[] names no layer. Leave it out to target every layer but the heads.")
        return value

    return check


def some_of(words: Sequence[str], error: type[LowRankError] = LowRankError) -> Check:
    """Accept ``None``, and lists of some of ``words``; returns a tuple."""

    def check(name: str, value: Any) -> Any:
        if value is None:
            return None
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        if not listed or not value or not all(word in words for word in value):
            raise error(f"{name}={value!r}: give a list with one or more of {', '.join(map(repr, words))}.")
        return tuple(value)

    return check


def device(name: str, value: Any) -> Any:
    """Accept a `torch.device`, or a string that names one which is here."""
    import torch  # only here: plans need no tensors

    if not isinstance(value, (str, torch.device)):
        raise refused(name, value, "a torch.device or its name, such as 'cuda:0'")
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise LowRankError(f"{name}={value!s}: there is no such device here: {why}") from error
    return value


SEED = whole(0, 2**63 - 1)
MODEL_OF = "a torch.nn.Module: load it first, for example with AutoModel.from_pretrained(...)"

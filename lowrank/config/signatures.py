"""Give a function whose last parameter is ``**options`` the signature and the documentation of all of them.

A type checker reads the typed dictionary that the parameter is unpacked from; `help`, editors that run the
code, and `inspect.signature` read what stands here.
"""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lowrank.arguments import refused
from lowrank.config.options import described, options_of, types_of

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")

PLACE = "**options:"
"""Where in a docstring the options are listed: the line of the parameter that collects them."""


def documented(config: type, door: str) -> Callable[[F], F]:
    """Decorate a function so that its signature and its docstring show every option of ``config``.

    Args:
        config: The configuration whose options the function takes as ``**options``.
        door: The function's name among the front doors, for the options that it lacks.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        types = types_of(config)
        added = [
            inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=types[one.name]
            )
            for one in options_of(config)
            if door not in one.missing
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        function.__doc__ = _with_options(function.__doc__ or "", config, door)
        return function

    return decorate


def _with_options(doc: str, config: type, door: str) -> str:
    lines = doc.split("\n")
    place = next((number for number, line in enumerate(lines) if line.strip().startswith(PLACE)), None)
    if place is None:  # under `python -OO` there are no docstrings
        return doc
    indent = " " * (len(lines[place]) - len(lines[place].lstrip()))
    told = (
        textwrap.wrap(
            line, 108, initial_indent=indent, subsequent_indent=indent + "    ", break_on_hyphens=False
        )
        for line in described(config, door).split("\n")
    )
    lines[place : place + 1] = [line for wrapped in told for line in wrapped]
    return "\n".join(lines)


def configured(config: type[C], door: str, given: C | None, options: Mapping[str, Any]) -> C:
    """Return the configuration that a caller asks for: an object, or options as keywords.

    Args:
        config: The class of configurations.
        door: The function that was called.
        given: An object of that class, or ``None``.
        options: The options that were given as keywords.

    Raises:
        LowRankError: If both are given, or an option has a wrong value.
        TypeError: If there is no such option, or ``door`` does not have it.
    """
    if given is not None:
        if not isinstance(given, config):
            raise refused("config", given, f"a {config.__name__}, or its options as keywords")
        if options:
            raise refused("config", given, f"either a {config.__name__} or {', '.join(options)}=, not both")
        return given
    known = {one.name: one for one in options_of(config)}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f". Did you mean {near[0]}=?" if near else ""
            raise TypeError(f"{door}(): got an unexpected keyword argument {name!r}{hint}")
        if door in known[name].missing:
            raise TypeError(f"{door}(): does not take {name}=: {known[name].missing[door]}.")
    return config(**options)

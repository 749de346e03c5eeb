"""What an option is: a field of a frozen dataclass, with its help, its check and who does not have it.

A configuration is a dataclass whose fields are made by `option`. Everything else that speaks of its options
reads these fields: signatures and docstrings (`lowrank.config.signatures`), the command line, `LowRankConfig`
and the tables of the guide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from lowrank.arguments import Check, choice, optional
from lowrank.errors import LowRankError

_KEY = "lowrank"


@dataclass(frozen=True)
class Option:
    """One option of a configuration.

    Args:
        name: Its name, in Python; the command line has dashes in place of underscores.
        type: Its type, as written in the source.
        default: What it is unless it is given.
        help: What it does, in a sentence or two.
        choices: The words that it may be, where these are few; empty otherwise.
        missing: ``{front door: why that does not have it}``.
        check: Accepts a value, or raises a `LowRankError` that names the option.
    """

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...]
    missing: Mapping[str, str]
    check: Check | None

    @property
    def flag(self) -> str:
        """The option on the command line: ``--max-bytes``."""
        return "--" + self.name.replace("_", "-")


def option(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    choices: Collection[str] = (),
    error: type[LowRankError] = LowRankError,
    missing: Mapping[str, str] | None = None,
) -> Any:
    """Make the field of an option; the arguments are those of `Option`, and ``error`` that of its choices."""
    if choices and check is None:
        words = choice(tuple(choices), error)
        check = words if default is not None else optional(words)
    known = {"help": help, "check": check, "choices": tuple(choices), "missing": dict(missing or {})}
    return field(default=default, metadata={_KEY: known})


def options_of(config: type) -> tuple[Option, ...]:
    """Return the options of a configuration, in the order of its fields."""
    return tuple(
        Option(item.name, str(item.type), item.default, **item.metadata[_KEY])
        for item in dataclasses.fields(config)
    )


def types_of(config: type) -> dict[str, Any]:
    """Return the options' types as objects, by name."""
    return get_type_hints(config)


def check_options(config: Any) -> None:
    """Check every option of ``config`` by itself, and keep what its check returns; for ``__post_init__``."""
    for one in options_of(type(config)):
        if one.check is not None:
            object.__setattr__(config, one.name, one.check(one.name, getattr(config, one.name)))


def given_options(config: Any) -> dict[str, Any]:
    """Return the options of ``config`` that are not at their defaults, by name."""
    every = {one.name: (one.default, getattr(config, one.name)) for one in options_of(type(config))}
    return {name: value for name, (default, value) in every.items() if value != default}


def described(config: type, door: str | None = None) -> str:
    """Return the lines of a docstring's section on the options that ``door`` has."""
    lines = []
    for one in options_of(config):
        if door not in one.missing:
            choices = f" One of {', '.join(map(repr, one.choices))}." if one.choices else ""
            lines.append(f"{one.name}: {one.help}{choices}")
    return "\n".join(lines)


def markdown_table(config: type) -> str:
    """Return the options as a Markdown table: name, type, default, what it does, and who lacks it."""
    rows = ["| Option | Type | Default | What it does |", "|---|---|---|---|"]
    for one in options_of(config):
        choices = f" One of {', '.join(f'`{word}`' for word in one.choices)}." if one.choices else ""
        lacks = "".join(f" Not in {door}: {why}." for door, why in one.missing.items())
        kind = one.type.replace("|", r"\|")
        rows.append(f"| `{one.name}` | `{kind}` | `{one.default!r}` | {one.help}{choices}{lacks} |")
    return "\n".join(rows)

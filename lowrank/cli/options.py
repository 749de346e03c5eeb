"""The options of the commands, each once; those of compression are the fields of `CompressionConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from lowrank.config import CompressionConfig
from lowrank.config.options import Option, options_of, types_of
from lowrank.errors import RankError

Source = Annotated[str, typer.Argument(help="A folder, or a name on the hub.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Text to calibrate on: a sample per line, or one text for a language model."),
]
StatsFolder = Annotated[Path | None, typer.Option("--stats", help="What `lowrank calibrate` wrote.")]
Windows = Annotated[int | None, typer.Option(help="Windows of 512 tokens to use; all by default.", min=1)]
Loss = Annotated[
    str, typer.Option(help="What calibration differentiates: auto, or none to spare the backward pass.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that has files.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


def _shared(name: str) -> typer.models.OptionInfo:
    """Return an option of compression for a command that takes only some of them."""
    (one,) = (one for one in options_of(CompressionConfig) if one.name == name)
    return typer.Option(one.flag, help=one.help)


Targets = Annotated[list[str] | None, _shared("targets")]
Ignore = Annotated[list[str] | None, _shared("ignore")]
Overrule = Annotated[list[str] | None, _shared("overrule")]
Seed = Annotated[int, _shared("seed")]

F = TypeVar("F", bound=Callable[..., Any])

_ON_THE_COMMAND_LINE: dict[Any, tuple[Any, str]] = {
    Sequence[str] | None: (list[str] | None, " Repeatable."),
    str | Path | None: (Path | None, ""),
}
"""By type in Python, the type on the command line, and what its help adds."""


def takes_options(door: str) -> Callable[[F], F]:
    """Give a command, whose last parameter is ``**options``, an option for every field that ``door`` has."""

    def decorate(command: F) -> F:
        hints = get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        types = types_of(CompressionConfig)
        parameters += [_parameter(one, types[one.name]) for one in _options_at(door)]
        in_order = sorted(parameters, key=lambda parameter: parameter.default is not parameter.empty)
        in_order = [p.replace(kind=p.KEYWORD_ONLY) for p in in_order]
        command.__signature__ = inspect.Signature(in_order)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in in_order}
        return command

    return decorate


def _options_at(door: str) -> list[Option]:
    return [one for one in options_of(CompressionConfig) if door not in one.missing]


def _parameter(one: Option, type: Any) -> inspect.Parameter:
    shown, more = _ON_THE_COMMAND_LINE.get(type, (type, ""))
    if one.name == "rank":
        shown, more = list[str] | None, " A pattern as PATTERN=RANK, repeatable."
    choices = f" One of {', '.join(one.choices)}." if one.choices else ""
    told = typer.Option(one.flag, help=f"{one.help}{more}{choices}")
    annotation = Annotated[shown, told]  # type: ignore[valid-type]
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=annotation
    )


def config_of(options: dict[str, Any]) -> CompressionConfig:
    """Return the configuration that the options of a command ask for.

    Raises:
        LowRankError: If one is out of its range.
    """
    return CompressionConfig(**{**options, "rank": _rank(options.get("rank"))})


def layers_of(config: CompressionConfig) -> dict[str, Any]:
    """Return which layers ``config`` is about, as `lowrank.calibrate` takes them."""
    return {name: getattr(config, name) for name in ("targets", "ignore", "overrule")}


def _rank(given: list[str] | None) -> int | dict[str, int] | None:
    """Return ``--rank 64`` as a number, and ``--rank '*.query=64'``, perhaps repeated, as a mapping."""
    if not given:
        return None
    pairs = [text.rpartition("=") for text in given]
    for (pattern, _, number), text in zip(pairs, given, strict=True):
        if not number.lstrip("-").isdecimal() or (len(given) > 1 and not pattern):
            raise RankError(f"--rank {text}: give a whole number, or PATTERN=RANK for each pattern.")
    ranks = {pattern: int(number) for pattern, _, number in pairs}
    return ranks.get("", ranks)


def given_flags(options: dict[str, Any], door: str) -> list[str]:
    """Return the flags of those ``options`` of ``door`` that are not at their defaults."""
    return [one.flag for one in _options_at(door) if options.get(one.name, one.default) != one.default]

"""Run a command, and turn warnings and failures into one line each, and an exit code."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

import typer

from lowrank.cli.commands import app
from lowrank.cli.inputs import one_line
from lowrank.errors import (
    BudgetError,
    DataError,
    LowRankError,
    RankError,
    SchemeError,
    TargetError,
)

WRONG_USE = (BudgetError, DataError, RankError, SchemeError, TargetError)


def main() -> None:
    """Run the command line, and turn warnings and failures into one line each, and an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except SystemExit as done:
        if done.code == 130:  # what typer makes of Ctrl-C, without a word
            _fail("interrupted", 1)
        raise
    except Exception as error:  # the last resort: a user sees one line, a developer asks for more
        if "--debug" in sys.argv:
            raise
        _fail(one_line(error), 2 if isinstance(error, WRONG_USE) else 1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    own = category.__module__ == LowRankError.__module__
    text = f"lowrank: {message}" if own else warnings.formatwarning(message, category, filename, lineno, line)
    typer.echo(text.rstrip(), file, err=file is None)


def _fail(message: str, code: int) -> None:
    typer.echo(f"lowrank: {message}", err=True)
    sys.exit(code)

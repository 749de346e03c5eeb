"""Warn users at the line of their own code that called the library, so that each such line warns once."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning that names the line outside of this library from which it was called."""
    level = 1
    while _is_own(sys._getframe(level).f_globals.get("__name__", "")) and sys._getframe(level).f_back:
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)


def _is_own(module: str) -> bool:
    return module.split(".")[0] == __name__.split(".")[0]

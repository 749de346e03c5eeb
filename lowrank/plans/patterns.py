"""Unix-style patterns on module names, as `targets`, `ignore` and rank mappings use them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from lowrank.errors import TargetError


def matches(name: str, pattern: str) -> bool:
    """Tell whether the module name matches the Unix-style, case-sensitive ``pattern``."""
    return fnmatch.fnmatchcase(name, pattern)


def is_wildcard(pattern: str) -> bool:
    """Tell whether ``pattern`` can match more than one name."""
    return any(sign in pattern for sign in "*?[")


def no_match(pattern: str, names: Sequence[str], where: str) -> TargetError:
    """Make the error for a pattern that matches none of ``names``, with the closest ones."""
    bare = pattern.strip("*.")

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, bare, name[-len(bare) - 2 :]).ratio()

    close = sorted(names, key=likeness, reverse=True)[:2]
    hint = f"\n  Closest: {', '.join(close)}." if close else ""
    return TargetError(f'"{pattern}" matches none of the {len(names)} {where}.{hint}')

"""Check the fields of plain data by the types that their dataclass declares: the data may be a stranger's."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lowrank.arguments import LARGEST, is_finite
from lowrank.errors import PlanError

_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "float | None": (float, int, type(None)),
}


def check_fields(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check JSON ``values`` against the fields of a dataclass; the file may come from a stranger."""
    types = {f.name: f.type for f in fields(cls) if f.init}
    for key, value in values.items():
        if key not in types or types[key] not in _TYPES:
            raise PlanError(f'{where} has an unknown field "{key}".')
        allowed = _TYPES[str(types[key])]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise PlanError(f'{where}: "{key}" is {quoted(value)}, but must be {types[key]}.')
        if isinstance(value, float) and not is_finite(value):
            raise PlanError(f'{where}: "{key}" is {value!r}, but must be a finite number.')
        if isinstance(value, int) and abs(value) > LARGEST:
            raise PlanError(f'{where}: "{key}" is {quoted(value)}, but nothing has more than {LARGEST:,}.')
    return values


def quoted(value: object) -> str:
    """Return how a message quotes a value, which may be of any size."""
    scalar = value is None or isinstance(value, (str, int, float))
    return repr(value)[:80] if scalar else f"a {type(value).__name__}"

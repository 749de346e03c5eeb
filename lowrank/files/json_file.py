"""JSON from files that may be anyone's: whatever they hold, the answer is an object or one kind of error.

This file uses the standard library only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowrank.errors import CheckpointError, LowRankError

DEEPEST = 64
"""Levels of nesting that are read. The files of this library have four; thousands would exhaust the stack."""


def check_regular(file: str | Path) -> None:
    """Refuse what is no ordinary file, since opening a named pipe would wait forever; links are followed.

    Raises:
        OSError: If there is no such file, or it is a directory, a pipe or a device.
    """
    path = Path(file)
    if not path.is_file():
        path.stat()
        raise OSError(f"{path.name} is no ordinary file")


def read_json(file: str | Path, error: type[LowRankError] = CheckpointError) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        LowRankError: As ``error``, if the file cannot be read, or does not hold a JSON object.
    """
    try:
        check_regular(file)
        found = parse_json(Path(file).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return found
    except (OSError, ValueError) as cause:
        raise error(f"{file}: cannot be read: {cause}.") from cause


def check_format(
    where: str | Path, number: object, current: int, error: type[LowRankError] = CheckpointError
) -> None:
    """Refuse what another version of lowrank has written.

    Args:
        where: The file, or what it is, for the message.
        number: Its format number.
        current: The only format that this version reads.
        error: The class of the error.

    Raises:
        LowRankError: As ``error``, if ``number`` is another one, or none.
    """
    if type(number) is not int:
        raise error(f'{where}: has no "format" number. It was not written by lowrank.')
    if number > current:
        raise error(
            f"{where}: has format {number}; this version of lowrank reads {current}. Install a newer lowrank."
        )
    if number < current:
        raise error(
            f"{where}: has format {number}, of an older lowrank; this version reads {current}. Make it anew, "
            "or read it with the version that wrote it."
        )


def parse_json(text: str) -> Any:
    """Return what ``text`` says; raises `ValueError` if it is not JSON, or nested too deeply."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not _is_flat(found):
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return found


def _is_flat(document: Any) -> bool:
    """Tell whether nothing lies deeper than `DEEPEST` levels, without recursion."""
    level = [document]
    for _ in range(DEEPEST):
        nested = [node for node in level if isinstance(node, (dict, list))]
        level = [child for node in nested for child in (node.values() if isinstance(node, dict) else node)]
    return not level

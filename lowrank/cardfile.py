"""The file of a model card: a digest in it tells a ``README.md`` that `lowrank` wrote from a user's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

CARD = "README.md"

_LARGEST = 100_000
"""Bytes that a card of ours never reaches."""

_SIGNATURE = re.compile(
    rb"\n<!-- lowrank-card [0-9a-f]{64}: the next save writes this file anew, unless somebody edits it. -->\n"
)


def write_card(folder: Path, text: str | None) -> None:
    """Write ``text`` as the card of ``folder``; ``None`` removes the card that an older save wrote.

    A README that somebody else wrote, or edited, stays as it is.
    """
    file = folder / CARD
    if is_foreign(file) or not folder.is_dir():  # transformers logs that its target is a file, and goes on
        return
    file.unlink(missing_ok=True)
    if text is not None:
        file.write_bytes(_signed(text.encode()))


def keep_readme(folder: Path, staging: Path) -> None:
    """Take the card out of ``staging``, which is to replace ``folder``, if a user's README is there."""
    if is_foreign(folder / CARD):
        (staging / CARD).unlink(missing_ok=True)


def is_foreign(file: Path) -> bool:
    """Tell whether there is a README which `lowrank` did not write, or which was edited since."""
    return (file.exists() or file.is_symlink()) and not is_own_card(file)


def is_own_card(file: Path) -> bool:
    """Tell whether ``file`` is a card just as `write_card` wrote it."""
    if file.name != CARD or file.is_symlink() or not file.is_file() or file.stat().st_size > _LARGEST:
        return False
    content = file.read_bytes()
    found = _SIGNATURE.search(content)
    return found is not None and content == _signed(content[: found.start()])


def _signed(text: bytes) -> bytes:
    digest = hashlib.sha256(text).hexdigest()
    note = f"lowrank-card {digest}: the next save writes this file anew, unless somebody edits it."
    return text + f"\n<!-- {note} -->\n".encode()

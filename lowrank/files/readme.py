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


def write_card(folder: Path, text: str) -> None:
    """Write ``text`` as the card of ``folder``, signed, so that a later save knows it for its own."""
    (folder / CARD).write_bytes(_signed(text.encode()))


def keep_readme(folder: Path, staging: Path) -> None:
    """Take the card out of ``staging``, which is to replace ``folder``, if a user's README is there."""
    readme = folder / CARD
    if (readme.exists() or readme.is_symlink()) and not is_own_card(readme):
        (staging / CARD).unlink(missing_ok=True)


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

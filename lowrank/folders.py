"""Write a folder as one step: beside its final place, then renamed, so that an interrupt harms nothing."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.errors import CheckpointError

TENSORS = "model.safetensors"
STRUCTURE = "lowrank.json"


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that `save` may write to ``folder``, before the work that is to be saved.

    Raises:
        CheckpointError: If it is a file, or has files that must not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file is in the way. Choose another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{folder}: the folder is not empty. Choose another one, or pass overwrite=True (--overwrite)."
        )


@contextmanager
def staged(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write to, and put it in the place of ``folder`` if all went well.

    Raises:
        CheckpointError: As `check_folder`, or if the file system refuses.
    """
    target = folder.resolve()
    staging = _sibling(target, "new")
    try:
        check_folder(folder, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        _replace(target, staging)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sibling(target: Path, role: str) -> Path:
    """Name a folder beside ``target``, on the same file system, so that renaming is atomic."""
    return target.parent / f".{target.name}.{role}-{secrets.token_hex(4)}"


def _replace(target: Path, staging: Path) -> None:
    """Put ``staging`` in the place of ``target``; what is not part of a checkpoint is carried over."""
    if target.is_dir():
        for entry in target.iterdir():
            if not (staging / entry.name).exists() and not _is_checkpoint_file(entry):
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, staging / entry.name)
    for file in staging.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if not target.exists():
        staging.rename(target)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_checkpoint_file(path: Path) -> bool:
    """Tell whether an older save wrote ``path``; a new save must not keep it, such as a stale shard."""
    return path.name in (STRUCTURE, "config.json") or bool(_WEIGHTS.fullmatch(path.name))


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

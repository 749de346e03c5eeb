"""Write a file as one step, so that an interrupt, a kill or a full disk leaves the old one whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.errors import CheckpointError
from lowrank.files.locks import WORK, locked


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a file to write to, of the same name, and put it in the place of ``path`` if all went well.

    A link stays a link: what it leads to is replaced. Devices and pipes are written to directly.

    Raises:
        CheckpointError: As `check_file`, or if the file system refuses.
    """
    with _opened_file(path) as new:
        yield new
        target = path.resolve()
        if new != path and new.exists():
            keep_mode(target, new)
            flush(new)
            new.replace(target)
            flush(target.parent)


def check_file(path: Path) -> None:
    """Check that `replaced` may write ``path`` by trying, before the work that is to be saved.

    Raises:
        CheckpointError: If it is a folder, it cannot be written, or another process is writing it.
    """
    with _opened_file(path):
        pass


@contextmanager
def _opened_file(path: Path) -> Iterator[Path]:
    """Give a place for the new file, beside the old one, and remove that place in the end."""
    with refusals(path):
        if path.is_dir():
            raise CheckpointError(f"{str(path)!r}: a folder is in the way. Give the name of a file.")
        if path.exists() and not path.is_file():
            yield path  # a device or a pipe
            return
        target = path.resolve()
        with locked(target.parent / f".{target.name}{WORK}") as work:
            new = work / "new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            try:
                yield new / target.name
            finally:
                shutil.rmtree(new, ignore_errors=True)


@contextmanager
def refusals(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn what the file system says into an error that names ``path``, and ``others`` that stand for it."""
    refusing: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except refusing as error:
        raise CheckpointError(f"{path}: cannot be written: {error}.") from error


def keep_mode(old: Path, new: Path) -> None:
    """Give ``new`` the permissions of the file that it replaces: what was private stays private."""
    if old.exists() and old.stat().st_mode != new.stat().st_mode:
        shutil.copymode(old, new)


def flush(path: Path) -> None:
    """Wait until the disk has what was written to the file, or changed in the folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do so for folders
            raise
    finally:
        os.close(handle)

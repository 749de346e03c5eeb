"""A folder that one process at a time may use: it lasts as long as its user, and a kill ends the claim."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lowrank.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a Unix: two processes are not told apart
    fcntl = None  # type: ignore[assignment]

WORK = ".lowrank-save"
"""What folders to lock are called, or how their names end; none outlives the next call."""

LOCK = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""What file systems without locks answer; there, two processes are not told apart either."""


class BusyError(CheckpointError):
    """Another process has the folder."""


@contextmanager
def locked(work: Path) -> Iterator[Path]:
    """Make the folder ``work`` for this process alone; what is empty of it in the end is removed.

    Raises:
        BusyError: If another process has it.
        OSError: If it cannot be made or written.
    """
    with ExitStack() as stack:  # which does the rest also where Ctrl-C comes in between
        stack.callback(_tried, work.rmdir)  # it is not empty where another process has come
        handle = _lock(work)
        stack.callback(os.close, handle)  # which ends the lock, as the end of the process does
        stack.callback(_tried, (work / LOCK).unlink)
        yield work


def _tried(change: Callable[[], None]) -> None:
    with suppress(OSError):
        change()


def _lock(work: Path) -> int:
    """Return the handle of a locked file in ``work``."""
    if work.is_symlink():
        raise CheckpointError(f"{work}: a link is where lowrank keeps its own files. Remove it.")
    while True:
        work.mkdir(exist_ok=True)
        try:
            handle = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:
            continue  # another process has just removed the folder
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise BusyError(f"{work.parent}: another process is writing here. Wait for its end.") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
        if _is_at(handle, work / LOCK):
            return handle
        os.close(handle)  # its last user has removed the file meanwhile


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False

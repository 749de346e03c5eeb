"""Make a call in a forked process, and stop it at its n-th change of the file system, or after a while."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from lowrank import LowRankError

CHANGES = {f"os.{name}" for name in ("mkdir", "rmdir", "rename", "remove", "chmod", "truncate", "symlink")}
"""What Python announces to audit hooks, beside the opening of files."""

GROWS = {"os.mkdir", "open", "native", "fsync"}
"""What a full disk refuses."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Stop(NamedTuple):
    """How a call is stopped.

    Args:
        way: "kill" or "interrupt" it, let the disk be "full", or "nothing".
        step: At which change of the file system, from 1; 0 for a moment in time.
        seconds: After how long, without a step.
        torn: Whether the file opened last is cut in two, as a kill within writing it would leave it.
    """

    way: str
    step: int = 0
    seconds: float = 0.0
    torn: bool = False


class End(NamedTuple):
    """How a call ended.

    Args:
        how: "killed", "interrupted", "refused" by a `LowRankError`, "done", or "failed" otherwise.
        steps: Changes of the file system until then.
        text: The error.
    """

    how: str
    steps: int
    text: str


def stopped(call: Callable[[], object], folder: Path, stop: Stop) -> End:
    """Make ``call`` in a child process, whose changes below ``folder`` are counted, and stop it."""
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the child is not ready for it
    child = os.fork()
    if child == 0:
        _child(call, folder, stop, writing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.close(writing)
    try:
        if not stop.step and stop.way != "nothing":
            time.sleep(stop.seconds)
            os.kill(child, signal.SIGKILL if stop.way == "kill" else signal.SIGINT)
        with os.fdopen(reading, "r") as stream:
            how, _, rest = stream.read().partition("\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    steps, _, text = rest.partition("\n")
    return End(how, int(steps), text) if how else End("killed", 0, "")


def _child(call: Callable[[], object], folder: Path, stop: Stop, writing: int) -> None:
    """Make the call, tell how it ended, and end this process, whatever happens."""
    steps, text = Steps(folder, stop), ""
    try:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        steps.count()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        call()
        how = "done"
    except LowRankError as error:
        how, text = "refused", str(error)
    except BaseException as error:
        how, text = ("interrupted", "") if _is_interrupt(error) else ("failed", traceback.format_exc())
    finally:
        steps.stop = Stop("nothing")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(writing, f"{how}\n{steps.number}\n{text}".encode()[:60_000])
        os._exit(0)


def _is_interrupt(error: BaseException) -> bool:
    """Tell Ctrl-C, or what typer makes of it, from other errors."""
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort"


class Steps:
    """Counts the changes of the file system below a folder, and stops this process at one of them."""

    def __init__(self, folder: Path, stop: Stop) -> None:
        self.folder, self.stop, self.number = str(folder), stop, 0
        self._last: str | None = None

    def count(self) -> None:
        """Begin to count; this is not undone, so it is for a process that will end."""
        serialize = safetensors.torch.serialize_file

        def native(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            self._step("native", str(path))
            serialize(tensors, path, *args, **kwargs)
            self._last = str(path)

        safetensors.torch.serialize_file = native
        os.fsync = lambda handle: self._step("fsync", self.folder)  # a kill does not lose what is in memory
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        if opened or event in CHANGES:
            self._step(event, args[0])

    def _step(self, event: str, path: Any) -> None:
        inside = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)
        relative = isinstance(path, str) and not os.path.isabs(path)  # as shutil.rmtree gives them
        if not inside and not (relative and event != "open"):
            return
        self.number += 1
        if self.stop.step and self.number >= self.stop.step:
            self._stop(event)
        if event == "open":
            self._last = os.fspath(path)

    def _stop(self, event: str) -> None:
        way = self.stop.way
        if way == "full":
            if event in GROWS:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        self.stop, torn = Stop("nothing"), self.stop.torn
        if torn and self._last is not None and os.path.isfile(self._last):
            os.truncate(self._last, os.path.getsize(self._last) // 2)
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt

"""Write a folder as one step, so that an interrupt, a kill or a full disk loses nothing.

New files are written into a hidden folder inside of the target: it is on the same file system, also where the
target is a mount point. Then the files that they replace are moved aside into it, and they are moved in:

    .lowrank-save/
      lock     held by the process that writes
      new/     what is being written
      old/     what it replaces, moved aside
      ready/   `new` under another name: everything is written, and the old is aside

That renaming is the moment from which the new files count. However a call has ended, the next one finishes
(where `ready` is there) or undoes it (else). The manifest, such as ``config.json``, leaves first and arrives
last, so that no program reads old and new files together: in between it finds no manifest.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lowrank.errors import CheckpointError
from lowrank.files.atomic_file import flush, keep_mode, refusals
from lowrank.files.locks import LOCK, WORK, BusyError, locked
from lowrank.files.readme import is_own_card, keep_readme

TENSORS = "model.safetensors"
SHARDS = "model-*.safetensors"
STRUCTURE = "lowrank.json"
MANIFESTS = ("config.json", STRUCTURE, "stats.json", "snapshot.json")

_MODEL = re.compile(r"config\.json|lowrank\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_KINDS = (
    _MODEL,
    re.compile(r"stats\.(json|safetensors)"),
    re.compile(r"snapshot\.(json|safetensors)"),
)
"""Names of files that belong together: a new manifest ends all older ones, such as a stale shard."""

_PATIENCE = 60.0
"""Seconds that a reader waits for another process to move files in, which takes it milliseconds."""


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that `staged` may write to ``folder`` by doing so, before the work that is to be saved.

    Raises:
        CheckpointError: If it has no name of its own, is a file, has files that must not be replaced, cannot
            be written, or another process is writing to it.
    """
    with _opened(folder, overwrite):
        pass


@contextmanager
def staged(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write to, and move its files into ``folder`` if all went well.

    Other files in ``folder`` stay untouched, but for those of the same kind (`_KINDS`).

    Raises:
        CheckpointError: As `check_folder`, or if the file system refuses.
    """
    with _opened(folder, overwrite) as work:
        new = work / "new"
        new.mkdir()
        yield new
        keep_readme(folder, new)
        for file in _files(new):
            _share(new / file, work)
            flush(new / file)
        _move_aside(new, folder, work / "old")
        for place in (new, work / "old", work, folder):
            flush(place)
        new.rename(work / "ready")
        flush(work)


def _share(file: Path, work: Path) -> None:
    """Let those read ``file`` who can read other new files: some writers make theirs the owner's alone."""
    lock = work / LOCK
    if lock.exists():
        file.chmod(lock.stat().st_mode & 0o666)


def settle(folder: Path) -> None:
    """Finish or undo what an interrupted call has left half done in ``folder``, before it is read.

    Where files are only being written, beside the old ones, nothing needs to be done.

    Raises:
        CheckpointError: If that is not possible.
    """
    work, end = folder / WORK, time.monotonic() + _PATIENCE
    while _files(_pending(work)):
        try:
            with locked(work):
                _finish_or_undo(folder, work)
            return
        except BusyError:
            if time.monotonic() > end:
                raise
        except OSError as error:
            raise CheckpointError(
                f"{folder}: an interrupted call has left it half written, and this one cannot put it in "
                f"order: {error}. Load it once from where it can be written."
            ) from error
        time.sleep(0.01)


@contextmanager
def _opened(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Lock ``folder``, which is made if need be, and leave it in order, whatever happens."""
    if folder.name in ("", ".."):
        raise CheckpointError(
            f"folder={str(folder)!r}: give a folder of its own, by its name, such as 'model-small'."
        )
    with ExitStack() as stack:
        stack.enter_context(refusals(folder, SafetensorError))
        _check_free(folder, overwrite)
        stack.enter_context(_present(folder))
        work = stack.enter_context(locked(folder / WORK))
        _finish_or_undo(folder, work)
        _check_free(folder, overwrite)
        try:
            yield work
        finally:
            try:
                _finish_or_undo(folder, work)
            except BaseException:  # Ctrl-C, in all likelihood: no other program should see it half done
                _finish_or_undo(folder, work)
                raise


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file is in the way. Choose another folder.")
    if folder.is_dir() and not overwrite and any(entry.name != WORK for entry in folder.iterdir()):
        raise CheckpointError(
            f"{folder}: the folder is not empty. Choose another one, or pass overwrite=True (--overwrite)."
        )


@contextmanager
def _present(folder: Path) -> Iterator[None]:
    """Make ``folder`` and its parents, and remove again those in which nothing was put."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in missing:
            with suppress(OSError):  # it has files now
                place.rmdir()


def _finish_or_undo(folder: Path, work: Path) -> None:
    """Bring ``folder`` to its new state if all of that was written, and to the old one if not."""
    _move_in(_pending(work), folder)
    shutil.rmtree(work / "new", ignore_errors=True)
    shutil.rmtree(work / "old", ignore_errors=True)
    if not (work / "old").exists():  # as long as it is there, `ready` says that it must not come back
        shutil.rmtree(work / "ready", ignore_errors=True)


def _pending(work: Path) -> Path:
    """Return where the files are that belong into the target: the new ones, or those it had before."""
    return work / ("ready" if os.path.isdir(work / "ready") else "old")


def _move_aside(new: Path, folder: Path, old: Path) -> None:
    """Move what the files in ``new`` replace from ``folder`` to ``old``, manifests first."""
    names = _files(new)
    _check_way(folder, names)
    kinds = [kind for kind in _KINDS if any(kind.fullmatch(str(name)) for name in names)]
    going = {name for name in names if os.path.lexists(folder / name)}
    for name in going:
        keep_mode(folder / name, new / name)
    for entry in folder.iterdir():
        stale = any(kind.fullmatch(entry.name) for kind in kinds) or (_MODEL in kinds and is_own_card(entry))
        if stale and not entry.is_dir():
            going.add(Path(entry.name))
    old.mkdir()
    for name in reversed(_manifests_last(going)):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(old / name)


def _move_in(source: Path, folder: Path) -> None:
    """Move the files in ``source`` into ``folder``, manifests last."""
    names = _manifests_last(_files(source))
    _check_way(folder, names)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(folder / name)
    if names:
        flush(folder)


def _check_way(folder: Path, names: list[Path]) -> None:
    """Check that no folder stands where a file is to go, and no file or link where a folder is."""
    for name in names:
        if (folder / name).is_dir():
            raise CheckpointError(f"{folder / name}: a folder is in the way of a file. Move it away.")
        for parent in name.parents[:-1]:
            place = folder / parent
            if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
                raise CheckpointError(f"{place}: a file or a link is in the way of a folder. Move it away.")


def _files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` and below, without following links, as paths relative to it."""
    if os.path.islink(folder):  # in a stranger's folder: it could lead anywhere
        return []
    return [Path(place, name).relative_to(folder) for place, _, names in os.walk(folder) for name in names]


def _manifests_last(names: Iterable[Path]) -> list[Path]:
    return sorted(names, key=lambda name: (str(name) in MANIFESTS, name))

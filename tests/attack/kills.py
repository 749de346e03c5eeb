"""Every call that writes is stopped, at each step or at a random moment, and made again.

It is stopped by a kill, by Ctrl-C, or by a disk that is full from some step on. Afterwards

- a program that knows nothing of lowrank, and finds a manifest, finds all files of one state, old or new;
- lowrank itself reads the old or the new state;
- what else is in the folder is as it was;
- the same call, made again, ends in the new state, and leaves no other file.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import Attack, Broken
from stopping import End, Stop, stopped
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

import lowrank
from lowrank import CheckpointError, LowRankError
from lowrank.allocation.latency import LatencyTable
from lowrank.cli.commands import app
from lowrank.distillation.recovery import trainable
from lowrank.distillation.snapshots import Snapshot
from lowrank.files.folders import MANIFESTS

OLD, NEW = 0, 1
Files = dict[str, tuple[int, bytes | str]]
"""By relative path: the mode, and the bytes of a file or where a link leads."""


@dataclass(frozen=True)
class Writer:
    """A call that writes.

    Args:
        name: The call.
        path: What it writes, in a folder.
        write: Writes the old or the new version to this path.
        read: Returns what lowrank reads there, in a form to compare; raises a `LowRankError` if nothing is.
        weight: How often it is stopped, for what it costs.
        stages: Whether the call writes other states on its way.
    """

    name: str
    path: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], object]
    weight: int = 4
    stages: bool = False


# --- the calls


@functools.cache
def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16)).eval()


@functools.cache
def small(version: int) -> nn.Module:
    return lowrank.compress(copy.deepcopy(dense()), rank=2 + version)


@functools.cache
def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 12, "max_position_embeddings": 8}
    return BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).eval()


@functools.cache
def bert_folder() -> Path:
    """Return a folder with a dense model and its tokenizer, for the command line."""
    folder = Path(tempfile.mkdtemp(prefix="attack-kills-"))
    bert().save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "rank", "a", "b", "c", "d", "e"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@functools.cache
def small_bert(version: int) -> nn.Module:
    return lowrank.compress(copy.deepcopy(bert()), rank=2 + version)


def save_bert(path: Path, version: int) -> None:
    """Save the new one by `lowrank.save`; the old one is in shards, as transformers writes them."""
    if version == NEW:
        lowrank.save(small_bert(NEW), path, overwrite=True)
    else:
        small_bert(OLD).save_pretrained(path, max_shard_size="4KB")


def compress_bert(path: Path, version: int) -> None:
    how = ["--rank", str(2 + version), "--overwrite", "-q"]
    if app(["compress", str(bert_folder()), str(path), *how], standalone_mode=False) == 130:
        raise KeyboardInterrupt  # which typer turns into this exit code


@functools.cache
def stats(version: int) -> lowrank.Stats:
    return lowrank.calibrate(dense(), batches(16 + version))


def batches(count: int) -> list[torch.Tensor]:
    return [torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def recover(path: Path, version: int) -> None:
    """Train for a few steps; the old version is what Ctrl-C leaves of that."""
    student, teacher = copy.deepcopy(small(OLD)), copy.deepcopy(dense())
    calls = itertools.count()

    def interrupted(*_: Any) -> None:
        if version == OLD and next(calls) == 5:
            raise KeyboardInterrupt

    teacher.register_forward_hook(interrupted)
    with suppress(KeyboardInterrupt) if version == OLD else nullcontext():
        lowrank.recover(student, teacher, batches(6), steps=6, mixed_precision=False, checkpoint_dir=path)


def read_snapshot(path: Path) -> object:
    found = Snapshot.load(path, trainable(small(OLD)))
    if found is None:
        raise CheckpointError("no snapshot")
    parts = (found.parameters, found.kept, *found.moments)
    return found.steps, [tensor.tolist() for part in parts for tensor in part]


def values(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def table(version: int) -> LatencyTable:
    return LatencyTable({"device": "cpu"}, {"16×16@4": [(0, 1.0), (2, 2.0 + version)]})


WRITERS = (
    Writer(
        "save",
        "model",
        lambda path, version: lowrank.save(small(version), path, overwrite=True),
        lambda path: values(lowrank.load(path, copy.deepcopy(dense()))),
    ),
    Writer("save-transformers", "model", save_bert, lambda path: values(lowrank.load(path)), weight=2),
    Writer("compress", "model", compress_bert, lambda path: values(lowrank.load(path)), weight=1),
    Writer(
        "Stats.save",
        "stats",
        lambda path, version: stats(version).save(path, overwrite=True),
        lambda path: lowrank.Stats.load(path).moments("0").products.tolist(),
    ),
    Writer("recover", "run", recover, read_snapshot, stages=True),
    Writer(
        "Plan.save",
        "plan.json",
        lambda path, version: lowrank.plan(dense(), rank=2 + version).save(path),
        lambda path: lowrank.Plan.load(path),
    ),
    Writer(
        "LatencyTable.save",
        "table.json",
        lambda path, version: table(version).save(path),
        lambda path: vars(LatencyTable.load(path)),
    ),
)


# --- what is expected


@dataclass(frozen=True)
class Expected:
    """What a call does when nobody stops it.

    Args:
        files: What it writes, by version.
        read: What lowrank reads then, by version.
        steps: Changes of the file system, while the old version is replaced.
        seconds: How long that takes.
    """

    files: tuple[Files, Files]
    read: tuple[object, object]
    steps: int
    seconds: float


@functools.cache
@patch("os.fsync", lambda handle: None)
def expected(writer: Writer) -> Expected:
    found: list[tuple[Files, object]] = []
    with tempfile.TemporaryDirectory(prefix="attack-kills-") as name:
        path = Path(name) / writer.path
        for version in (OLD, NEW):
            writer.write(path, version)
            found.append((files_in(Path(name)), writer.read(path)))
        end = stopped(lambda: writer.write(path, NEW), Path(name), Stop("nothing"))
        start = time.monotonic()
        stopped(lambda: writer.write(path, NEW), Path(name), Stop("nothing"))
        seconds = time.monotonic() - start
    if end.how != "done":
        raise Broken(f"{writer.name}: {end.how} without being stopped: {end.text}")
    (old, first), (new, second) = found
    return Expected((old, new), (first, second), end.steps, seconds)


def files_in(folder: Path) -> Files:
    """Return all files below ``folder``, and empty folders as links to nothing."""
    found: Files = {}
    for place, folders, names in os.walk(folder):
        for name in names + [one for one in folders if os.path.islink(Path(place, one))]:
            path = Path(place, name)
            content = os.readlink(path) if path.is_symlink() else path.read_bytes()
            found[str(path.relative_to(folder))] = path.lstat().st_mode, content
        if not names and not folders and place != str(folder):
            found[str(Path(place).relative_to(folder))] = 0, ""
    return found


def put(folder: Path, files: Files) -> None:
    """Write what `files_in` has found elsewhere."""
    for name, (mode, content) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
            path.chmod(mode & 0o7777)


# --- the attempt


@dataclass
class Scene:
    """A folder in which a call is stopped.

    Args:
        writer: The call.
        folder: Where.
        others: The files that are none of the call's.
        before: The files of the old version; empty where there is none.
    """

    writer: Writer
    folder: Path
    others: Files
    before: Files

    @property
    def path(self) -> Path:
        return self.folder / self.writer.path

    def seen(self) -> Files:
        """Return the files that a program sees which knows nothing of lowrank."""
        found = files_in(self.folder)
        return {name: file for name, file in found.items() if ".lowrank-save" not in name and file[0]}

    def has_manifest(self) -> bool:
        return self.path.is_file() or any(Path(name).name in MANIFESTS for name in self.seen())

    def check_files(self, where: str) -> None:
        """Check that other files are untouched, and that a manifest has all the files that belong to it."""
        seen = self.seen()
        changed = {name for name, file in self.others.items() if seen.pop(name, None) != file}
        if changed:
            raise Broken(f"{where}: other files are changed: {sorted(changed)}")
        if self.has_manifest():
            wanted = (self.before, expected(self.writer).files[NEW])
            if self.writer.stages:
                if seen.keys() != wanted[1].keys():
                    raise Broken(f"{where}: a manifest with {sorted(seen)}")
            elif seen not in wanted:
                raise Broken(f"{where}: old and new files are mixed: {_difference(seen, wanted)}")

    def check_refused(self, where: str) -> None:
        """Check that a call which fails by itself has left nothing."""
        found, wanted = files_in(self.folder), (self.before, expected(self.writer).files[NEW])
        if not self.writer.stages and found not in [self.others | files for files in wanted]:
            raise Broken(f"{where}: the call has left something: {_difference(found, wanted)}")

    def check_read(self, where: str) -> str:
        """Check what lowrank reads, and return which state that is."""
        wanted = expected(self.writer).read
        try:
            found = self.writer.read(self.path)
        except LowRankError as error:
            if not self.before and not self.has_manifest():
                return "nothing"
            raise Broken(f"{where}: neither the old nor the new can be read: {error}") from error
        if found == wanted[NEW]:
            return "new"
        if (found == wanted[OLD] and self.before) or self.writer.stages:
            return "old"
        raise Broken(f"{where}: what is read is neither the old nor the new.")

    def check_end(self, where: str) -> None:
        """Check that the call has done all, and left nothing else."""
        wanted = self.others | expected(self.writer).files[NEW]
        found = files_in(self.folder)
        if found != wanted:
            raise Broken(f"{where}: not what an undisturbed call writes: {_difference(found, (wanted,))}")
        if self.check_read(where) != "new":
            raise Broken(f"{where}: what is read is not the new.")


def _difference(found: Files, wanted: tuple[Files, ...]) -> str:
    return "; ".join(
        ", ".join(sorted(name for name in found.keys() | files.keys() if found.get(name) != files.get(name)))
        for files in wanted
    )


def scene(rng: random.Random, folder: Path) -> Scene:
    (writer,) = rng.choices(WRITERS, [writer.weight for writer in WRITERS])
    before = expected(writer).files[OLD] if rng.random() < 0.7 else {}
    put(folder, before)
    others: Files = {}
    if rng.random() < 0.7:
        place = folder if writer.path.endswith(".json") else folder / writer.path
        (place / "runs").mkdir(parents=True, exist_ok=True)
        (place / "runs" / "log.txt").write_bytes(rng.randbytes(20))
        (place / "notes.txt").write_bytes(rng.randbytes(20))
        (place / "notes.txt").chmod(0o664)
        (place / "link").symlink_to(rng.choice(["notes.txt", "runs", "nowhere"]))
        others = {name: file for name, file in files_in(folder).items() if name not in before}
    return Scene(writer, folder, others, before)


def stop_of(rng: random.Random, training: Expected) -> Stop:
    way = rng.choice(["kill", "kill", "interrupt", "full"])
    if way != "full" and rng.random() < 0.25:
        return Stop(way, seconds=rng.uniform(0, training.seconds))
    return Stop(way, step=rng.randint(1, training.steps), torn=way == "kill" and rng.random() < 0.5)


@patch("os.fsync", lambda handle: None)  # slow, and a kill does not lose what is in memory
def attempt(seed: int, folder: Path) -> Counter[str]:
    """Stop one call, once or several times, and make it again."""
    rng, outcomes = random.Random(seed), Counter[str]()
    one = scene(rng, folder)
    for _ in range(rng.choice([1, 1, 2, 3])):
        stop = stop_of(rng, expected(one.writer))
        end = stopped(lambda: one.writer.write(one.path, NEW), folder, stop)
        where = f"{one.writer.name}, {'replacing' if one.before else 'new'}, {stop}, {end.how}"
        check_call(where, stop, end)
        one.check_files(where)
        if end.how == "refused" and not outcomes:
            one.check_refused(where)
        state = one.check_read(where) if rng.random() < 0.7 else "not read"
        one.check_files(where)
        if end.how == "done" and state in ("old", "nothing"):
            raise Broken(f"{where}: the call says that it is done, but what is read is {state}.")
        outcomes[f"{end.how}: {state}"] += 1
    one.writer.write(one.path, NEW)
    one.check_end(f"{where}, made again")
    return outcomes


def check_call(where: str, stop: Stop, end: End) -> None:
    """Check that the call ended as it may: a full disk is an error of lowrank, or was not in the way."""
    allowed = {"kill": ("killed", "done"), "interrupt": ("interrupted", "done"), "full": ("refused", "done")}
    in_native_code = stop.way == "interrupt" and not stop.step  # which may make another error of Ctrl-C
    if end.how not in allowed[stop.way] and not in_native_code:
        raise Broken(f"{where}: {end.text}")


KILLS = Attack(
    "kills",
    "calls that write, stopped by a kill, Ctrl-C or a full disk at any step or moment, and made again",
    attempt,
)

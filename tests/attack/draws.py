"""Random arguments: mostly good ones, some on the border, some that are nonsense.

A source that only ever gives its least number draws the plainest arguments: so hypothesis can shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

Arguments = dict[str, Any]
T = TypeVar("T")

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3.7, -0.5, math.nan, math.inf, -math.inf, 10**30, 2**63, 1e-300, 1j),
    *("", "x", "*", "int8", "auto", "loss", "\0", "é" * 300, b"x", Path("x"), Path("/dev/null/x")),
    *([], ["*"], [""], [[]], [None], (), (1,), {}, {"*": 4}, {"*": "4"}, {1: 1}, {"0": 0}, set(), range(3)),
    *(np.int64(4), np.float32(0.5), np.array([1, 2]), torch.tensor(3), torch.tensor(0.5), torch.empty(0)),
    *(object(), int, len, Ellipsis, nn.Linear(2, 2), [torch.ones(1)], iter([]), Random(0)),
)


def maybe(random: Random, chance: float) -> bool:
    """Return ``True`` with this chance; the least number gives ``False``."""
    return random.random() > 1 - chance


def one(random: Random, *values: T) -> T:
    """Return one of ``values``, of which the first is the plainest."""
    return values[random.randrange(len(values))]


def budget(random: Random, layers: Sequence[str], size: int) -> Arguments:
    """Return one budget, for a model with these layers and so many bytes."""
    kind = one(random, "rank", "rank", "keep", "keep", "energy", "error", "max_bytes")
    if kind == "rank":
        ranks: Any = random.randint(1, 12)
        if layers and maybe(random, 0.15):
            ranks = {pattern(random, layers): random.randint(1, 8) for _ in range(random.randint(1, 2))}
        return {"rank": ranks}
    if kind == "max_bytes":
        return {"max_bytes": max(1, int(size * random.uniform(0.2, 1.1)))}
    border = one(random, None, None, None, None, 1e-9, 1 - 1e-9, 0.5)
    return {kind: random.uniform(0.05, 0.98) if border is None else border}


def pattern(random: Random, layers: Sequence[str]) -> str:
    """Return a pattern that mostly matches one of the layers."""
    name = one(random, *layers) if layers else "0"
    return one(random, name, name, "*", f"{name[:1]}*", f"*{name[-1:]}", "[!x]*", "nothing*")


def selection(random: Random, layers: Sequence[str]) -> Arguments:
    """Return targets or patterns to ignore, or neither."""
    chosen: Arguments = {}
    for name in ("targets", "ignore"):
        if maybe(random, 0.12):
            chosen[name] = [pattern(random, layers) for _ in range(random.randint(1, 2))]
    return chosen


def request(random: Random, layers: Sequence[str], size: int) -> Arguments:
    """Return what `compress` and `plan` have in common."""
    options: dict[str, tuple[float, Callable[[], Any]]] = {
        "round_to": (0.6, lambda: one(random, 1, 2, 4, 16)),
        "allocation": (0.2, lambda: "uniform"),
        "metric": (0.15, lambda: one(random, "weight", "loss", "inputs", "diagonal", "auto")),
        "add_bias": (0.15, lambda: True),
        "share": (0.15, lambda: one(random, "inputs", "layers")),
        "share_size": (0.03, lambda: one(random, 2, 3)),
        "quantize": (0.3, lambda: one(random, "int8", "int8", "int4", "auto")),
        "group_size": (0.06, lambda: one(random, 4, 8, 2)),
        "correction": (0.08, lambda: True),
        "tolerance": (0.05, lambda: one(random, 1e-3, 1e-9, 0.5)),
        "overrule": (0.04, lambda: [pattern(random, layers)]),
    }
    drawn = {name: make() for name, (chance, make) in options.items() if maybe(random, chance)}
    if drawn.get("quantize") == "int4" and maybe(random, 0.7):
        drawn["group_size"] = one(random, 4, 8)
    if drawn.get("quantize") == "auto" and maybe(random, 0.7):
        return budget_in_bytes(random, size) | drawn | selection(random, layers)
    return budget(random, layers, size) | drawn | selection(random, layers)


def budget_in_bytes(random: Random, size: int) -> Arguments:
    """Return a budget in bytes that quantizes can meet."""
    return {"max_bytes": max(1, int(size * random.uniform(0.15, 0.9)))}


def spoiled(random: Random, arguments: Arguments, also: Sequence[str] = ()) -> Arguments:
    """Return the arguments, sometimes with nonsense in place of one of them, or for one of ``also``."""
    names = [*arguments, *also]
    if not names or not maybe(random, 0.12):
        return arguments
    name, odd = one(random, *names), one(random, *ODD)
    if name == "loss" and callable(odd):
        return arguments  # errors of the user's own functions are the user's
    return arguments | {name: odd}


def odd_data(random: Random, good: list[Any]) -> Any:
    """Return data with something about them that a calibration must take, or refuse."""
    first = good[0]
    tensor = next(iter(first.values())) if isinstance(first, dict) else first
    odd: tuple[Any, ...] = (
        *(
            iter(good),
            tuple(good),
            [(batch, "label") for batch in good],
            DataLoader(tensor, 2, generator=torch.Generator()),
        ),
        *([], [None], ["a text"], [*good, None], [*good, tensor[:0]], [tensor.sum()], [[]], tensor),
        *([tensor.double()], [tensor.long()], [tensor[..., :3]], [tensor[0]], [tensor.mT.contiguous().mT]),
        *([torch.full(tensor.shape, math.nan)], [*good, tensor * 10], [tensor.new_zeros(tensor.shape)]),
        *([{"x": tensor}], [{"input": tensor}], [{}], [tensor.tolist()], [tensor.to("meta")]),
    )
    return one(random, *odd)

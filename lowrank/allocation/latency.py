"""Latency as a budget: measure layers at candidate ranks here and now, then check the whole model.

What a rank costs on a processor is no formula: kernels like some sizes, small matrices are all
overhead. So each shape in the model is timed dense and at a grid of ranks, with the tokens that the
given inputs bring to it. The solver spends these seconds as it would spend parameters.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank import arguments
from lowrank.allocation.candidates import Offer
from lowrank.allocation.costs import Costs
from lowrank.arguments import MODEL_OF, accepts, instance, number, whole
from lowrank.errors import BudgetError, LowRankError
from lowrank.files.atomic_file import replaced
from lowrank.files.json_file import read_json
from lowrank.inspection.contexts import hooked
from lowrank.inspection.devices import device_of, dtype_of
from lowrank.inspection.timing import seconds_of, timed
from lowrank.linalg import linear
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan

POINTS = 9
"""Ranks timed per shape, evenly spaced up to the break-even; between them it is interpolated."""

REPEATS = 15
"""Runs of each; the median counts."""


@dataclass
class LatencyTable:
    """Seconds of a linear layer, dense and at candidate ranks, on one machine.

    Entries are measured when they are first asked for, and kept. A table can be saved and used again
    on the same machine; one from another machine is refused.

    Args:
        environment: Device, threads, dtype and version that the figures depend on.
        seconds: By ``"out×in@tokens"``, pairs of rank and seconds; rank 0 is the dense layer.
    """

    environment: dict[str, str]
    seconds: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("environment", "seconds"):
            instance(dict, "a dict; LatencyTable.here(model) makes a table")(name, getattr(self, name))

    @classmethod
    @accepts(model=instance(nn.Module, MODEL_OF))
    def here(cls, model: nn.Module) -> LatencyTable:
        """Make an empty table for the device and dtype of ``model``."""
        device = device_of(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(
            {
                "device": f"{device.type} {name}".strip(),
                "threads": str(torch.get_num_threads()),
                "dtype": str(dtype_of(model)).removeprefix("torch."),
                "torch": torch.__version__,
            }
        )

    @accepts(
        layer=instance(LayerPlan, "a LayerPlan, an entry of a plan"),
        tokens=whole(1),
        like=instance(Tensor, "a tensor of the layer's dtype and device"),
    )
    def of(self, layer: LayerPlan, tokens: int, like: Tensor) -> list[tuple[int, float]]:
        """Return ``(rank, seconds)`` for a layer's shape, rank 0 for dense, measuring them if need be."""
        key = f"{layer.out_features}×{layer.in_features}@{tokens}"
        if key not in self.seconds:
            largest = max(1, layer.break_even_rank)
            ranks = sorted({max(1, round(largest * (i + 1) / POINTS)) for i in range(POINTS)})
            self.seconds[key] = _measure(layer, tokens, ranks, like)
        return self.seconds[key]

    @accepts(path=arguments.path())
    def save(self, path: str | Path) -> None:
        """Write the table as JSON, in one step.

        Raises:
            CheckpointError: If the file cannot be written; an older one is then as it was.
        """
        text = json.dumps(vars(self), indent=1, ensure_ascii=False, allow_nan=False)
        with replaced(Path(path)) as new:
            new.write_text(text, encoding="utf-8")

    @classmethod
    @accepts(path=arguments.path())
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            LowRankError: If the file cannot be read or is no such table.
        """
        try:
            data = read_json(path)
            for key in ("environment", "seconds"):
                instance(dict, "a JSON object")(key, data.get(key))
            environment = {key: arguments.text()(key, value) for key, value in data["environment"].items()}
            return cls(environment, {key: _points(key, points) for key, points in data["seconds"].items()})
        except LowRankError as error:
            raise LowRankError(f"{path}: not a table of latencies: {error}") from error


def _points(where: str, points: Any) -> list[tuple[int, float]]:
    """Return pairs of rank and seconds from JSON: the dense layer first, then rising ranks."""
    pairs = arguments.every(_pair, (list,), "a list of pairs of rank and seconds")(where, points)
    ranks = [rank for rank, _ in pairs]
    if len(ranks) < 2 or ranks[0] != 0 or ranks != sorted(set(ranks)):
        raise LowRankError(f"{where}: the ranks must begin with 0, the dense layer, and rise.")
    return [(int(rank), float(seconds)) for rank, seconds in pairs]


def _pair(where: str, pair: Any) -> Any:
    if not isinstance(pair, list) or len(pair) != 2:
        raise LowRankError(f"{where}: give a pair of rank and seconds.")
    return whole()(f"{where}: the rank", pair[0]), number(0)(f"{where}: the seconds", pair[1])


def latency_costs(
    model: nn.Module,
    draft: Plan,
    call: Callable[[], Any],
    table: LatencyTable,
    speedup: float,
    slack: float = 0.0,
) -> Costs:
    """Price ranks in seconds, so that the whole model becomes ``speedup`` times as fast.

    Args:
        model: The dense model.
        draft: Its layers.
        call: Runs the model once on representative inputs.
        table: Latencies of layers, filled as needed.
        speedup: Dense latency over compressed latency.
        slack: Seconds by which an earlier choice missed the goal.

    Raises:
        BudgetError: If the table is of another machine.
    """
    if table.environment != LatencyTable.here(model).environment:
        raise BudgetError(
            f"The table of latencies is of {table.environment}, but this is "
            f"{LatencyTable.here(model).environment}. Measure a new one."
        )
    tokens = _tokens(model, draft, call)
    whole = seconds_of(call, REPEATS, device_of(model))
    points = {}
    for layer in draft.targeted:
        like = model.get_submodule(layer.name).weight
        points[layer.name] = [table.of(layer, count, like) for count in tokens.get(layer.name, [])]  # type: ignore[arg-type]
    dense = sum(at[0][1] for calls in points.values() for at in calls)

    def price(offer: Offer) -> np.ndarray[Any, Any]:
        costs = np.array([sum(map(seconds, offer.layers_at(point))) for point in range(len(offer.costs))])
        rising = np.maximum.accumulate(costs[:-1]) + 1e-12 * np.arange(len(costs) - 1)
        return np.append(rising, max(costs[-1], 1e-12))

    def seconds(layer: LayerPlan) -> float:
        """Return the time of all calls of a layer; of a narrower one, in proportion to its width."""
        if layer.rank is None:
            return layer.kept_fraction * sum(at[0][1] for at in points[layer.name])
        return sum(float(np.interp(layer.rank, *_xy(at))) for at in points[layer.name])

    def say(cost: float) -> str:
        return f"{cost:.4g} s, a speed-up of {whole / cost:.2f}×"

    return Costs(whole / speedup - slack, whole - dense, price, say)


def _xy(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [rank for rank, _ in points[1:]], [seconds for _, seconds in points[1:]]


def _measure(layer: LayerPlan, tokens: int, ranks: list[int], like: Tensor) -> list[tuple[int, float]]:
    """Time one shape, dense (rank 0) and at each rank, in turn, by the products that each computes with."""
    m, n = layer.out_features, layer.in_features
    inputs, weight, bias = like.new_zeros(tokens, n), like.new_zeros(m, n), like.new_zeros(m)
    runs: dict[int, Callable[[], Any]] = {0: lambda: nn.functional.linear(inputs, weight, bias)}
    for rank in ranks:
        down, up = like.new_zeros(rank, n), like.new_zeros(m, rank)
        runs[rank] = lambda down=down, up=up: linear(linear(inputs, down), up, bias)  # type: ignore[misc]
    times: dict[int, list[float]] = {rank: [] for rank in runs}
    with torch.no_grad():
        for repeat in range(REPEATS + 2):
            for rank, run in runs.items():
                seconds = timed(run, like.device)
                if repeat >= 2:
                    times[rank].append(seconds)
    return [(rank, statistics.median(values)) for rank, values in times.items()]


def _tokens(model: nn.Module, draft: Plan, call: Callable[[], Any]) -> dict[str, list[int]]:
    """Return how many rows each call of each layer gets."""
    found: dict[str, list[int]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = args[0] if args else kwargs["input"]
            found.setdefault(name, []).append(inputs.numel() // inputs.shape[-1])

        return hook

    layers = {layer.name: model.get_submodule(layer.name) for layer in draft.targeted}
    with hooked(x.register_forward_pre_hook(keep(name), with_kwargs=True) for name, x in layers.items()):
        call()
    return found

"""Measure a dense and a compressed model side by side: latency and peak memory, per layer and whole.

Timings of one machine drift, so the two are run in turn, after a warm-up, and medians are compared.
Memory is counted, not sampled: the bytes of the tensors alive during a forward pass.
"""

from __future__ import annotations

import math
import platform
import statistics
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lowrank.arguments import MODEL_OF, accepts, instance, whole
from lowrank.errors import DataError, LowRankError
from lowrank.inspection.contexts import check_has_data, eval_mode, hooked
from lowrank.inspection.devices import device_of, dtype_of
from lowrank.inspection.layers import check_model
from lowrank.inspection.timing import timed
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedLinear, TiedLinear, layer_type_of
from lowrank.plans.formatting import format_bytes, format_table, to_json


@dataclass(frozen=True)
class Comparison:
    """One module, dense and small, on the same input.

    Attributes:
        name: Module name; empty for the whole model.
        rank: Inner size of the small layer; ``None`` for the whole model.
        seconds_dense, seconds_small: Median latency of a forward pass.
        peak_bytes_dense, peak_bytes_small: Most bytes of activations alive at once in a forward pass.
        theoretical_speedup: MACs of the linear layers, dense over small.
    """

    name: str
    rank: int | None
    seconds_dense: float
    seconds_small: float
    peak_bytes_dense: int
    peak_bytes_small: int
    theoretical_speedup: float

    @property
    def speedup(self) -> float:
        """Measured: dense latency over small latency."""
        return self.seconds_dense / self.seconds_small


@dataclass(frozen=True)
class Benchmark:
    """The whole model and its factorized layers, with the machine that they were measured on.

    Attributes:
        model: The whole model; its theoretical speed-up counts the linear layers only.
        layers: One row per factorized layer that the forward pass runs through.
        environment: Device, threads, versions, dtype, repetitions.
    """

    model: Comparison
    layers: tuple[Comparison, ...]
    environment: dict[str, Any]

    def to_json(self) -> str:
        """Return everything as JSON, for programs."""
        data = asdict(self)
        for comparison, row in zip((self.model, *self.layers), (data["model"], *data["layers"]), strict=True):
            row["speedup"] = comparison.speedup
        return to_json(data)

    def __str__(self) -> str:
        header = ("layer", "rank", "dense ms", "small ms", "speed-up", "theory", "peak dense", "peak small")
        rows = [_row(comparison) for comparison in (*self.layers, self.model)]
        machine = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return format_table(header, rows) + "\n\n" + machine


@accepts(
    dense=instance(nn.Module, MODEL_OF),
    small=instance(nn.Module, MODEL_OF),
    inputs=instance(
        (Tensor, tuple, list, Mapping), "a tensor, a tuple, or a mapping of keyword arguments", DataError
    ),
    repeats=whole(1),
    warmup=whole(0),
)
def benchmark(
    dense: nn.Module,
    small: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    repeats: int = 15,
    warmup: int = 3,
) -> Benchmark:
    """Compare the latency and peak memory of ``dense`` and ``small`` on the same ``inputs``.

    Args:
        dense: The model before compression; both are put into evaluation mode for the duration.
        small: The compressed model, on the same device.
        inputs: What the model is called with: a tensor, a tuple, or a mapping of keyword arguments
            (such as a tokenizer's output). Tensors are moved to the device of the models.
        repeats: Timed runs of each, in turn; the median counts.
        warmup: Runs of each that do not count.

    Returns:
        A `Benchmark`: print it, or take `Benchmark.to_json`.

    Raises:
        LowRankError: If ``small`` has no factorized layer, the models do not fit, or no run is asked for.
    """
    for model in (dense, small):
        check_model(model)
    names = [name for name, module in small.named_modules() if isinstance(module, LowRankLinear)]
    if not names:
        raise LowRankError(
            "The second model has no factorized layer. Pass benchmark(dense, compressed, inputs)."
        )
    missing = next((name for name in names if name not in dict(dense.named_modules())), None)
    if missing is not None:
        raise LowRankError(
            f"{missing}: the dense model has no such layer. Pass the model before compression."
        )
    device = device_of(dense)
    if device_of(small) != device:
        raise LowRankError(f"The models are on different devices: {device} and {device_of(small)}.")
    check_has_data(small)
    inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, _plain(inputs))
    with eval_mode(dense), eval_mode(small), torch.no_grad():
        _check_call("dense", dense, inputs)
        _check_call("small", small, inputs)
        captured = _capture_inputs(dense, names, inputs)
        layers = tuple(
            _compare(dense.get_submodule(name), small.get_submodule(name), (given,), name, repeats, warmup)
            for name, given in captured.items()
        )
        whole = _compare(dense, small, inputs, "", repeats, warmup, _theory(dense, small))
    return Benchmark(whole, layers, _environment(device, small, repeats))


def _plain(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return (inputs,)
    return dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)


def _check_call(name: str, model: nn.Module, inputs: Any) -> None:
    """Call a model once; its own error says which one it was.

    Raises:
        DataError: If it refuses the inputs.
    """
    try:
        _call(model, inputs)
    except Exception as error:
        raise DataError(
            f"{name} ({type(model).__name__}) refuses the inputs: {type(error).__name__}: {error}"
        ) from error


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _capture_inputs(model: nn.Module, names: list[str], inputs: Any) -> dict[str, Tensor]:
    """Run ``model`` once and keep the first input of each named layer."""
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: captured.__setitem__(name, [*args, *kwargs.values()][0])

    layers = {name: model.get_submodule(name) for name in names}
    with hooked(x.register_forward_pre_hook(keep(name), with_kwargs=True) for name, x in layers.items()):
        _call(model, inputs)
    return {name: captured[name] for name in names if name in captured}


def _compare(
    dense: nn.Module,
    small: nn.Module,
    inputs: Any,
    name: str,
    repeats: int,
    warmup: int,
    theory: float | None = None,
) -> Comparison:
    device = device_of(small)
    times: dict[nn.Module, list[float]] = {dense: [], small: []}
    for run in range(warmup + repeats):
        for model in (dense, small):
            seconds = timed(partial(_call, model, inputs), device)
            if run >= warmup:
                times[model].append(seconds)
    rank = small.rank if isinstance(small, LowRankLinear) else None
    return Comparison(
        name=name,
        rank=rank,
        seconds_dense=statistics.median(times[dense]),
        seconds_small=statistics.median(times[small]),
        peak_bytes_dense=peak_bytes(dense, inputs),
        peak_bytes_small=peak_bytes(small, inputs),
        theoretical_speedup=theory if theory is not None else _theory(dense, small),
    )


def _theory(dense: nn.Module, small: nn.Module) -> float:
    """Return the MACs of the replaced layers and all other matrices, dense over small."""

    def matrices(model: nn.Module) -> int:
        floating = sum(m.weight.numel() for m in model.modules() if layer_type_of(m) is not None)  # type: ignore[misc,operator]
        tied = sum(m.macs for m in model.modules() if isinstance(m, TiedLinear))
        quantized = sum(math.prod(m.shape) for m in model.modules() if isinstance(m, QuantizedLinear))
        return floating + quantized + tied

    replaced = sum(
        m.in_features * m.out_features - m.macs
        for m in small.modules()
        if isinstance(m, (LowRankLinear, TiedLinear))
    )
    replaced -= sum(m.rank * m.embedding_dim for m in small.modules() if isinstance(m, LowRankEmbedding))
    after = matrices(small)
    return (after + replaced) / after


def peak_bytes(model: nn.Module, inputs: Any) -> int:
    """Return the most bytes of tensors that one forward pass has allocated and not yet freed.

    Counted from the outputs of PyTorch's operators on any device; the inputs, the weights and the
    scratch memory inside a kernel are not included.
    """
    with torch.no_grad(), _Allocations() as allocations:
        _call(model, inputs)
    return allocations.peak


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _has_storage(leaf) and _storage(leaf) not in given | self._known:
                self._watch(leaf)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _has_storage(leaf: object) -> bool:
    """Return whether ``leaf`` is a tensor that lies in a storage; oneDNN's packed weights do not."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _environment(device: torch.device, model: nn.Module, repeats: int) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": repeats,
    }


def _row(comparison: Comparison) -> tuple[str, ...]:
    return (
        comparison.name or "whole model",
        "" if comparison.rank is None else str(comparison.rank),
        f"{1000 * comparison.seconds_dense:.2f}",
        f"{1000 * comparison.seconds_small:.2f}",
        f"{comparison.speedup:.2f}×",
        f"{comparison.theoretical_speedup:.2f}×",
        format_bytes(comparison.peak_bytes_dense),
        format_bytes(comparison.peak_bytes_small),
    )

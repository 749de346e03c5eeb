"""The stages between the verbs, on one inspection of the model: calibrate, decide, quantize, carry out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import adapter
from lowrank.allocation.neurons import decide_widths, widths_of
from lowrank.allocation.planner import Latencies, decide, drafted
from lowrank.allocation.quantization_targets import check_kernels, with_heads, with_quantized_weights
from lowrank.allocation.refusals import reasons
from lowrank.allocation.selection import storage_formats
from lowrank.arguments import optional
from lowrank.calibration.cross_fitting import collect
from lowrank.calibration.data import Batch, batches
from lowrank.calibration.statistics import Stats, nonempty_stats
from lowrank.config import CompressionConfig
from lowrank.errors import BudgetError, DataError, LowRankError, TargetError
from lowrank.inspection.devices import device_of
from lowrank.inspection.eligibility import lost_neurons
from lowrank.inspection.inspection import Inspection
from lowrank.linalg import Scheme
from lowrank.nn import TiedLinear
from lowrank.plans.plan import Plan
from lowrank.plans.storage_formats import INT8
from lowrank.surgery.neurons import statistics_of_kept
from lowrank.surgery.overruled import check_reads, check_subclasses
from lowrank.surgery.quantization_checks import without_shared_input_shifts
from lowrank.surgery.replacement import apply_plan, pivot_layers, quantize_weights
from lowrank.surgery.sequential import apply_sequentially

STATS = optional(nonempty_stats)
"""Accepts statistics that have seen something, or none."""


def stream_of(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """Return the batches of ``data``, where the model is."""
    adapter().check_tokenizer(model, tokenizer)
    if device is None:
        device = device_of(model)
    return batches(
        data, tokenizer, device=device, batch_size=batch_size, max_length=max_length, by_length=True
    )


def calibrated(
    seen: Inspection,
    config: CompressionConfig,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None,
    loss: Callable[[Any, Any], Tensor] | str | None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    *,
    progress: bool = False,
) -> Stats:
    """Return the statistics of the layers that ``config`` targets; `lowrank.calibrate` tells the rest."""
    model = seen.model
    patterns = CompressionConfig(targets=config.targets, ignore=config.ignore, overrule=config.overrule)
    layers = drafted(seen, patterns, None, embeddings=True)
    stream = stream_of(model, data, tokenizer, device, batch_size, max_length)
    names = [layer.name for layer in layers.targeted]
    names += [
        x.name for x in layers if x.is_narrower and x.reason == lost_neurons(model.get_submodule(x.name))
    ]
    names += [name for name in layers.owners if not isinstance(model.get_submodule(name), TiedLinear)]
    if not names:
        raise TargetError("\n".join([f"No layer of {layers.model} is there to calibrate.", *reasons(layers)]))
    heads = {layer.name: layer.tied_to for layer in layers if layer.tied_to is not None}
    return collect(
        *(seen, names, stream, loss), heads=heads, tokenizer=tokenizer, seed=config.seed, progress=progress
    )


def quantized_plan(
    seen: Inspection,
    plan: Plan,
    scheme: Scheme,
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
    stats: Stats | None,
    optional: bool = False,
) -> Plan:
    """Return ``plan`` with the weights that ``scheme`` is to store as integers."""
    found = with_quantized_weights(
        *(seen, plan, scheme), targets=targets, ignore=ignore, stats=stats, optional=optional
    )
    return found.without_needless_ties()


def decided(
    seen: Inspection,
    layers: Plan,
    config: CompressionConfig,
    stats: Stats | None,
    predict: bool,
    progress: bool,
    latencies: Latencies,
) -> Plan:
    """Return the plan for ``config``: ranks and formats of the targeted layers, integers for all else."""
    asked = seen, layers, config, stats, predict, progress, latencies
    choose = _narrowed if config.removes_neurons else decide
    if config.quantize is None:
        return choose(*asked).without_needless_ties()
    (storage_format, *others) = storage_formats(config)
    scheme = INT8 if others or storage_format.scheme is None else storage_format.scheme
    if config.max_bytes is None:
        return quantized_plan(seen, choose(*asked), scheme, None, config.ignore, stats)
    ignored = [*(config.ignore or ()), *(layer.name for layer in layers.targeted)]
    rest = quantized_plan(
        seen, replace(layers, quantized=()), scheme, None, ignored, stats, optional=True
    ).quantized
    chosen = with_heads(seen, decide(*asked, rest))
    return without_shared_input_shifts(chosen).without_needless_ties()


def _narrowed(
    seen: Inspection,
    layers: Plan,
    config: CompressionConfig,
    stats: Stats | None,
    predict: bool,
    progress: bool,
    latencies: Latencies,
) -> Plan:
    """Return the plan in which feed-forward blocks, as they are seen on inputs, may lose neurons."""
    if latencies.inputs is None:
        raise BudgetError(
            'forms=["neurons"] runs the model to see its feed-forward blocks: give data=, or inputs=, a '
            "batch as the model will get it."
        )
    if layers.metric != "weight" and stats is None:
        raise BudgetError(
            f"metric={layers.metric!r} needs statistics: pass data=, or stats=calibrate(model, data)."
        )
    (batch,) = batches([latencies.inputs], device=device_of(seen.model))
    asked = seen, layers, config, stats
    if config.only_neurons:
        return decide_widths(*asked, lambda: batch.call(seen.model), progress)
    blocks, _ = widths_of(*asked, lambda: batch.call(seen.model), progress)
    return decide(*asked, predict, progress, latencies, blocks=blocks)


def check_overruled(
    seen: Inspection,
    plan: Plan,
    inputs: Any,
    data: Iterable[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> None:
    """Try what the user has overruled, on ``inputs`` or on the first batch of ``data``."""
    check_subclasses(seen.model, plan)
    samples = data if inputs is None else [inputs]
    batch = None
    if plan.overruled and samples is not None:
        batch = next(stream_of(seen.model, samples, tokenizer), None)
    check_reads(seen, plan, batch)


def check_offload_folder(sequential: bool, offload_folder: str | Path | None) -> None:
    """Refuse a folder for hidden states that is missing, or that nothing needs."""
    if offload_folder is None:
        return
    if not sequential:
        raise DataError(
            "offload_folder= is for the hidden states that sequential=True keeps; without it, leave it out."
        )
    if not Path(offload_folder).is_dir():
        raise DataError(f"offload_folder={str(offload_folder)!r}: there is no such folder.")


def carried_out(
    seen: Inspection,
    plan: Plan,
    stats: Stats | None,
    data: Iterable[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    *,
    offload_folder: str | Path | None = None,
    on_missing_kernel: str = "warn",
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Change the model as ``plan`` says, on ``data`` block by block if there are some; and record it."""
    model = seen.model
    adapter().check_unquantized(model)
    check_kernels(model, plan, on_missing_kernel)
    check_subclasses(model, plan)
    try:
        if data is None:
            apply_plan(seen, plan, stats, seed=seed, progress=progress)
        else:
            folder = Path(offload_folder) if offload_folder is not None else None
            stream = stream_of(model, data, tokenizer, batch_size=_enough_batches(data))
            fitted = apply_sequentially(
                seen, plan, stats, stream, seed=seed, offload_folder=folder, progress=progress
            )
            now = statistics_of_kept(stats, fitted.kept)
            quantize_weights(model, plan, now, seed=seed, progress=progress)
            plan = plan.with_layers(
                {
                    name: replace(plan[name], reason=f"{plan[name].reason}; fitted anew")
                    for name in fitted.layers
                }
            )
    except LowRankError:
        raise  # nothing has changed
    except BaseException:  # an interrupt: what is done is done, and can be saved
        adapter().record(model, plan)
        raise
    pivot_layers(model, plan)
    adapter().record(model, plan)
    return model


def _enough_batches(data: Iterable[Any]) -> int:
    """Return the strings per batch that make eight batches of few strings, and else 32."""
    few = isinstance(data, Sequence) and isinstance(data[0] if data else None, str)
    return max(1, min(32, len(data) // 8)) if few and isinstance(data, Sequence) else 32

"""What the verbs are made of: the steps between a request and a plan, and between data and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank._transformers import check_tokenizer, plugin
from lowrank.allocation import quantization_targets
from lowrank.allocation.planner import (
    Request,
    Timing,
    decide,
    known_heads,
)
from lowrank.calibration.data import Batch, batches
from lowrank.calibration.statistics import Stats
from lowrank.errors import (
    DataError,
)
from lowrank.inspection.devices import device_of
from lowrank.linalg import Scheme
from lowrank.plans.plan import Plan
from lowrank.plans.storage_formats import INT8
from lowrank.surgery.overruled import check_reads, check_subclasses
from lowrank.surgery.quantization import without_shared_input_shifts


def quantized_plan(
    model: nn.Module,
    plan: Plan,
    scheme: Scheme,
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
    stats: Stats | None,
    optional: bool = False,
) -> Plan:
    """Return ``plan`` with the weights that ``scheme`` is to store as integers."""
    hf = plugin()
    separately_saved = hf.parts(model) if hf is not None else ()
    found = quantization_targets.with_codes(
        *(model, plan, scheme),
        targets=targets,
        ignore=ignore,
        stats=stats,
        heads=known_heads(model),
        separately_saved=separately_saved,
        optional=optional,
    )
    return found.without_needless_ties()


def check_overruled(
    model: nn.Module,
    plan: Plan,
    inputs: Any,
    data: Iterable[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> None:
    """Try what the user has overruled, on ``inputs`` or on the first batch of ``data``."""
    check_subclasses(model, plan)
    samples = data if inputs is None else [inputs]
    batch = (
        next(stream_of(model, samples, tokenizer), None) if plan.overruled and samples is not None else None
    )
    check_reads(model, plan, batch)


def enough_batches(data: Iterable[Any]) -> int:
    """Return the strings per batch that make eight batches of few strings, and else 32."""
    few = isinstance(data, Sequence) and isinstance(data[0] if data else None, str)
    return max(1, min(32, len(data) // 8)) if few and isinstance(data, Sequence) else 32


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


def stream_of(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """Return the batches of ``data``, where the model is."""
    check_tokenizer(model, tokenizer)
    if device is None:
        device = device_of(model)
    return batches(
        data, tokenizer, device=device, batch_size=batch_size, max_length=max_length, by_length=True
    )


def decided(
    model: nn.Module,
    layers: Plan,
    request: Request,
    stats: Stats | None,
    predict: bool,
    progress: bool,
    timing: Timing,
) -> Plan:
    """Return the plan for ``request``: ranks and forms of the targeted layers, codes for all else."""
    if request.quantize is None:
        return decide(model, layers, request, stats, predict, progress, timing).without_needless_ties()
    (form, *others) = request.forms
    scheme = INT8 if others or form.scheme is None else form.scheme
    if request.budget is None or request.budget.name != "max_bytes":
        chosen = decide(model, layers, request, stats, predict, progress, timing)
        return quantized_plan(model, chosen, scheme, None, request.ignore, stats)
    ignored = [*(request.ignore or ()), *(layer.name for layer in layers.targeted)]
    rest = quantized_plan(
        model, replace(layers, quantized=()), scheme, None, ignored, stats, optional=True
    ).quantized
    chosen = decide(model, layers, request, stats, predict, progress, timing, rest)
    return without_shared_input_shifts(quantization_targets.with_heads(model, chosen)).without_needless_ties()

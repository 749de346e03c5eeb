"""`calibrate`: what layers read, and how much it matters; `error_curves`: what each rank would lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank.adapter import inspect
from lowrank.allocation.planner import drafted, error_curves_of
from lowrank.arguments import (
    accepts,
    device,
    flag,
    function,
    optional,
    whole,
)
from lowrank.calibration.statistics import Stats
from lowrank.config import CompressionConfig
from lowrank.linalg import ErrorCurve
from lowrank.pipeline.stages import (
    STATS,
    calibrated,
)
from lowrank.surgery.factorization import merged

if TYPE_CHECKING:
    pass


@accepts(
    tokenizer=optional(function),
    device=optional(device),
    batch_size=whole(1),
    max_length=optional(whole(1)),
    progress=flag,
)
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | str | None = "auto",
    device: torch.device | str | None = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    overrule: Sequence[str] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Stats:
    """Learn what every linear layer reads, and how much its outputs matter to the loss.

    Args:
        model: Any module on any device. It runs in eval mode, and is left as it was.
        data: Strings, with a ``tokenizer``; or any iterable of batches: dicts, tensors, or tuples
            whose first element is the model's input (a DataLoader, a column of `datasets`).
        tokenizer: A tokenizer of transformers, for strings.
        loss: ``"auto"`` makes an objective from the outputs without labels
            (`lowrank.calibration.objectives`). A function ``loss(outputs, batch)`` returns a scalar, the
            mean over the batch's samples. ``None`` spares the backward pass; the metric ``"loss"`` is then
            not available.
        device: Where batches are moved to; by default where the model's first parameter is.
        targets: Unix-style patterns of the layers to look at; by default all but the heads.
        ignore: Patterns of layers to leave out.
        overrule: Patterns of layers to look at although they may have to stay dense, as in `compress`.
        batch_size: Strings per batch.
        max_length: Longest string in tokens; by default what the tokenizer allows, at most 512.
        seed: Seed of the sampled labels; the global random state is not touched.
        progress: Show a progress bar on a terminal.

    Returns:
        `Stats`, which answer every metric and budget. Add those of further data with ``+``.

    Raises:
        DataError: If there are no data, the model refuses a batch, or a loss is no scalar.
        StatsError: If a layer reads NaN or infinite values.
        TargetError: If no layer is left to calibrate: all are quantized already, for instance.

    Source: for the gradients, Martens & Grosse 2015 (K-FAC, arXiv:1503.05671).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> stats = calibrate(model, [torch.randn(32, 8), torch.randn(32, 8)])
        >>> stats.tokens, sorted(stats.gradients)
        (64, ['0', '2'])
    """
    config = CompressionConfig(targets=targets, ignore=ignore, overrule=overrule, seed=seed)
    return calibrated(
        *(inspect(model), config, data, tokenizer, loss, device, batch_size, max_length), progress=progress
    )


@accepts(stats=STATS, progress=flag)
def error_curves(
    model: nn.Module,
    *,
    stats: Stats | None = None,
    metric: str = "auto",
    add_bias: bool = False,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    progress: bool = False,
) -> dict[str, ErrorCurve]:
    """Decompose every targeted weight once: its error at every rank, by layer name.

    The arguments are those of `compress`.

    Raises:
        LowRankError: If a pattern matches nothing, or a weight cannot be factorized.
    """
    config = CompressionConfig(metric=metric, add_bias=add_bias, targets=targets, ignore=ignore)
    layers = drafted(inspect(model), config, stats)
    return error_curves_of(model, layers, merged(stats, layers), progress)

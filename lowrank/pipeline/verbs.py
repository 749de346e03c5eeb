"""The verbs of the library, each a few lines: inspect → calibrate → decide → carry out.

`compress` does everything in one call; `calibrate` only learns, `plan` only decides, `apply` only acts. What
the stages between them are is in `lowrank.pipeline.stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank.adapter import adapter, inspect
from lowrank.allocation.latency import LatencyTable
from lowrank.allocation.planner import Latencies, check_targeted, drafted, error_curves_of
from lowrank.arguments import (
    SEED,
    Check,
    accepts,
    device,
    flag,
    function,
    instance,
    optional,
    path,
    text,
    whole,
)
from lowrank.calibration.collector import warn_of_few_tokens
from lowrank.calibration.statistics import Stats, nonempty_stats
from lowrank.config import CompressionConfig, configured, documented
from lowrank.errors import BudgetError, DataError, LowRankError, PlanError, ReachWarning, SchemeError, warn
from lowrank.inspection.targets import draft
from lowrank.inspection.unplanned import with_reach
from lowrank.linalg import ErrorCurve, Scheme
from lowrank.pipeline.stages import (
    calibrated,
    carried_out,
    check_offload_folder,
    check_overruled,
    decided,
    quantized_plan,
)
from lowrank.plans.plan import Plan
from lowrank.surgery import replacement
from lowrank.surgery.factorization import pooled

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowrank.config import CompressionOptions, PlanOptions

_STATS = optional(nonempty_stats)
_ASKED: dict[str, Check] = {
    "latencies": optional(instance(LatencyTable, "a LatencyTable", BudgetError)),
    "stats": _STATS,
    "progress": flag,
}
"""What `compress` and `plan` have in common beside their options, which check themselves."""

REACH_TO_WARN_BELOW = 0.3
"""A share of the model's parameters: `compress` warns where it can change less, and nobody asked for that."""


@documented(CompressionConfig, "compress")
@accepts(**_ASKED, tokenizer=optional(function))
def compress(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    data: Iterable[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | str | None = "auto",
    stats: Stats | None = None,
    inputs: Any = None,
    latencies: LatencyTable | None = None,
    progress: bool = False,
    **options: Unpack[CompressionOptions],
) -> nn.Module:
    """Replace the model's linear layers by low-rank factors, in place, under exactly one budget.

    Args:
        model: Any module with linear layers, on any device, in any floating dtype.
        config: The options below as an object, in place of keywords.
        data: What to calibrate on, as for `lowrank.calibrate`. Without data the error is that of the
            weights alone, which costs far more accuracy.
        tokenizer: A tokenizer of transformers, for data that are strings.
        loss: As for `lowrank.calibrate`.
        stats: Statistics from `lowrank.calibrate`, in place of ``data``; with ``sequential``, beside them.
        inputs: What the model is called with to measure a ``speedup``, or to check ``overrule``: a batch, as
            in ``data``.
        latencies: A table of measured layers to use again, and to add to.
        progress: Show progress bars on a terminal.
        **options: listed here.

    Returns:
        The same model, with `LowRankLinear` layers. `lowrank.report` tells what it cost and won.

    Raises:
        LowRankError: If anything is wrong with the request or the model; the model is then as before.

    Warns:
        ReachWarning: If less than 30 % of the model's parameters can change, and neither ``targets`` nor
            ``ignore`` asked for that.

    Source: Eckart & Young 1936; the allocation as Shoham & Gersho 1988.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        >>> compress(model, rank=16)[0]
        LowRankLinear(
          in_features=256, out_features=256, rank=16, bias=True
          (down): Linear(in_features=256, out_features=16, bias=False)
          (up): Linear(in_features=16, out_features=256, bias=True)
        )
    """
    config = configured(CompressionConfig, "compress", config, options)
    budget = config.budget
    seen = inspect(model)  # a bad request fails before the work of calibrating
    layers = drafted(seen, config, stats)
    if config.sequential and data is None:
        raise DataError("sequential=True goes through data once more: give data=.")
    check_offload_folder(config.sequential, config.offload_folder)
    check_targeted(seen, layers, config)
    if (config.sequential or config.overrule) and isinstance(data, Iterator):
        data = list(data)  # to be gone through twice
    check_overruled(seen, layers, inputs, data, tokenizer)
    if data is not None and stats is not None and not config.sequential:
        raise LowRankError("Give either data or stats, not both. Add statistics of more data with +.")
    if stats is not None:
        warn_of_few_tokens(stats)
    elif data is not None:
        stats = calibrated(seen, config, data, tokenizer, loss, progress=progress)
        layers = drafted(seen, config, stats)
        check_targeted(seen, layers, config)  # statistics may lack what was targeted
    predict = budget.name != "rank"  # a given rank decides nothing by its error: spare the error curves
    chosen = decided(seen, layers, config, stats, predict, progress, Latencies(inputs, latencies))
    chosen = with_reach(seen, chosen)
    if config.targets is None and config.ignore is None and chosen.reachable_fraction < REACH_TO_WARN_BELOW:
        warn(chosen.small_reach(), ReachWarning)
    again = data if config.sequential else None
    return carried_out(
        *(seen, chosen, stats, again, tokenizer),
        offload_folder=config.offload_folder,
        on_missing_kernel=config.on_missing_kernel,
        seed=config.seed,
        progress=progress,
    )


@documented(CompressionConfig, "plan")
@accepts(**_ASKED)
def plan(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    stats: Stats | None = None,
    inputs: Any = None,
    latencies: LatencyTable | None = None,
    progress: bool = False,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Decide each layer's rank and storage format, and predict its error, without changing the model.

    Args:
        model: Any module with linear layers, as for `compress`.
        config: The options below as an object, in place of keywords.
        stats: Statistics from `lowrank.calibrate`.
        inputs: What the model is called with to measure a ``speedup``, or to check ``overrule``.
        latencies: A table of measured layers to use again, and to add to.
        progress: Show progress bars on a terminal.
        **options: listed here.

    Returns:
        A `Plan`: print it, save it, edit it (`Plan.with_rank`), compare it (`Plan.diff`), `apply` it.

    Raises:
        LowRankError: If anything is wrong with the request or the model.
    """
    config = configured(CompressionConfig, "plan", config, options)
    config.budget  # noqa: B018 - raises where there is none
    seen = inspect(model)
    layers = drafted(seen, config, stats)
    if stats is not None:
        warn_of_few_tokens(stats)
    check_targeted(seen, layers, config)
    check_overruled(seen, layers, inputs)
    chosen = decided(seen, layers, config, stats, True, progress, Latencies(inputs, latencies))
    return with_reach(seen, chosen)


@accepts(
    plan=instance(Plan, "a Plan, from plan(model, ...)", PlanError),
    stats=_STATS,
    sequential=flag,
    tokenizer=optional(function),
    offload_folder=optional(path(DataError)),
    on_missing_kernel=text(SchemeError),
    seed=SEED,
    progress=flag,
)
def apply(
    model: nn.Module,
    plan: Plan,
    stats: Stats | None = None,
    *,
    sequential: bool = False,
    data: Iterable[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    offload_folder: str | Path | None = None,
    on_missing_kernel: str = "warn",
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Carry out ``plan``, in place: replace layers by their factors, then weights by integers.

    Args:
        model: The model that the plan was made for. Layers keep their device, dtype, training mode,
            ``requires_grad`` and hooks; biases are the same parameters as before, with the mean of the
            error added under a calibrated metric.
        plan: Ranks by layer, from `plan`, perhaps edited. Layers that are factorized already must
            have the rank that it names.
        stats: The statistics that the plan was made with; needed unless its metric is ``"weight"``.
        sequential: Go through the model block by block, and let each make up for what was lost before it;
            see `lowrank.surgery.sequential` for the mathematics.
        data: What to do that on, as for `lowrank.calibrate`; only with ``sequential``.
        tokenizer: A tokenizer of transformers, for data that are strings.
        offload_folder: A folder on a disk for the hidden states, as in `compress`.
        on_missing_kernel: What to do about int4 weights without a kernel, as in `quantize`.
        seed: Seed of the randomized solver; results are reproducible for a seed.
        progress: Show a progress bar on a terminal.

    Returns:
        The same model. A transformers model's config now holds the plan, for ``save_pretrained``.

    Raises:
        PlanError: If a layer is missing, has another shape, must stay dense, or would not shrink.
        StatsError: If the statistics are of another model.
        WeightError: If a weight is not finite or has no data.
        DataError: If ``sequential`` comes without data, or the model refuses a batch.
            All are raised before anything has changed. An interrupt leaves the layers done so far.
    """
    if sequential != (data is not None):
        raise DataError(
            "sequential=True goes with data=, such as those of the calibration; data= goes with nothing else."
        )
    check_offload_folder(sequential, offload_folder)
    return carried_out(
        *(inspect(model), plan, stats, data, tokenizer),
        offload_folder=offload_folder,
        on_missing_kernel=on_missing_kernel,
        seed=seed,
        progress=progress,
    )


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


@accepts(
    scheme=text(SchemeError), stats=_STATS, on_missing_kernel=text(SchemeError), seed=SEED, progress=flag
)
def quantize(
    model: nn.Module,
    scheme: str = "int8",
    *,
    group_size: int | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    stats: Stats | None = None,
    on_missing_kernel: str = "warn",
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Store the weights of linear layers, factors and embeddings as integers, in place.

    Args:
        model: Any module, compressed or not. Call it again with other ``targets`` to mix schemes.
        scheme: ``"int8"``: one scale per row; linear layers multiply integers by integers. ``"int4"``: one
            scale per group of a row, 4.5 bits per weight; PyTorch's int4 kernels multiply the few tokens of
            a text that is being generated, and the dequantized weight multiplies many.
        group_size: Elements that share a scale under ``"int4"``; 32 by default.
        targets: Unix-style patterns of linear layers and embeddings, as `report` and ``named_modules`` call
            them; a factorized layer stands for both of its factors. By default all but the heads.
        ignore: Patterns to leave alone.
        stats: Statistics of the dense model, from `calibrate`: layers then scale and shift their inputs
            so that integers lose less.
        on_missing_kernel: What to do where int4 weights of linear layers have no kernel on the model's
            device, and are dequantized at every call: ``"warn"`` (`SlowKernelWarning`), ``"refuse"`` or
            ``"allow"``.
        seed: Of the rotation between factors; the global random state is not touched.
        progress: Show a progress bar on a terminal.

    Returns:
        The same model. Weights that are tied otherwise than a head to its embedding, used twice or read by
        value stay as they are.

    Raises:
        SchemeError: If the scheme is unknown, a weight does not divide into its groups, or int4 has no
            kernel and ``on_missing_kernel="refuse"``.
        WeightError: If a weight is not finite.
        TargetError: If a pattern matches nothing, or names what cannot be quantized.
        LowRankError: If nothing is left to quantize. The model is then as before.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
        >>> quantize(model)
        Sequential(
          (0): QuantizedEmbedding(10, 64, int8)
          (1): QuantizedLinear(in_features=64, out_features=64, int8, bias=True)
        )
    """
    seen = inspect(model)
    found, done = draft(seen), adapter().recorded(model)
    known = done.carried_out(found) if done is not None else found
    chosen = quantized_plan(seen, known, Scheme(scheme, group_size), targets, ignore, stats)
    return carried_out(seen, chosen, stats, on_missing_kernel=on_missing_kernel, seed=seed, progress=progress)


def decompress(model: nn.Module) -> nn.Module:
    """Multiply every factorized layer back into a dense one of its original type, in place.

    The outputs stay those of the compressed model, to rounding; the lost accuracy does not return.

    Returns:
        The same model.

    Raises:
        LowRankError: If the model is itself a factorized layer, or no module.
    """
    replacement.decompress(model)
    adapter().record(model)
    return model


@accepts(stats=_STATS, progress=flag)
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
    return error_curves_of(model, layers, pooled(stats, layers), progress)

"""The stages in order: calibrate → draft → spectra → select → apply. Read this file to see how it all fits.

`compress` does everything in one call; `plan` only decides; `apply` only acts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank._transformers import plugin
from lowrank.allocation import quantization_targets
from lowrank.allocation.latency import LatencyTable
from lowrank.allocation.planner import (
    Request,
    Timing,
    check_targeted,
    drafted,
    error_curves_of,
    known_heads,
)
from lowrank.allocation.selection import reasons
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
from lowrank.calibration.collector import collect, warn_of_few_tokens
from lowrank.calibration.statistics import Stats, nonempty_stats
from lowrank.errors import (
    BudgetError,
    DataError,
    LowRankError,
    PlanError,
    ReachWarning,
    SchemeError,
    TargetError,
    warn,
)
from lowrank.inspection.eligibility import check_model
from lowrank.inspection.targets import draft
from lowrank.inspection.unplanned import with_reach
from lowrank.linalg import ErrorCurve, Scheme
from lowrank.nn import TiedLinear
from lowrank.pipeline.stages import (
    check_offload_folder,
    check_overruled,
    decided,
    enough_batches,
    quantized_plan,
    stream_of,
)
from lowrank.plans.plan import Budget, Plan
from lowrank.surgery import replacement
from lowrank.surgery.factorization import pooled
from lowrank.surgery.overruled import check_subclasses
from lowrank.surgery.sequential import apply_anchored

_STATS = optional(nonempty_stats)
_REQUEST: dict[str, Check] = {
    "latencies": optional(instance(LatencyTable, "a LatencyTable", BudgetError)),
    "stats": _STATS,
    "metric": text(BudgetError),
    "add_bias": flag,
    "allocation": text(BudgetError),
    "round_to": whole(1, error=BudgetError),
    "share": optional(text(BudgetError)),
    "quantize": optional(text(SchemeError)),
    "correction": flag,
    "progress": flag,
}
"""What `compress` and `plan` have in common; words, patterns and budgets are checked where they are read."""

_SLOW = text(SchemeError)


_DATA: dict[str, Check] = {
    "tokenizer": optional(function),
    "sequential": flag,
    "offload_folder": optional(path(DataError)),
    "seed": SEED,
}


REACH_TO_WARN_BELOW = 0.3
"""A share of the model's parameters: `compress` warns where it can change less, and nobody asked for that."""


@accepts(**_REQUEST, **_DATA, on_missing_kernel=_SLOW)
def compress(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_bytes: int | None = None,
    speedup: float | None = None,
    inputs: Any = None,
    latencies: LatencyTable | None = None,
    data: Iterable[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | str | None = "auto",
    stats: Stats | None = None,
    metric: str = "auto",
    add_bias: bool = False,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    overrule: Sequence[str] | None = None,
    allocation: str = "global",
    round_to: int = 8,
    share: str | None = None,
    share_size: int | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    correction: bool = False,
    sequential: bool = False,
    offload_folder: str | Path | None = None,
    tolerance: float = 1e-3,
    on_missing_kernel: str = "warn",
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Replace the model's linear layers by low-rank factors, in place, under exactly one budget.

    Args:
        model: Any module with linear layers, on any device, in any floating dtype.
        rank: Inner size for every layer, or a mapping of name pattern to inner size (the last match
            wins). Taken exactly; a layer that it would not shrink stays dense.
        keep: Fraction of the targeted weights' parameters that remains, in (0, 1), spread over the
            layers so that the predicted increase of the loss is least; under other metrics than
            ``"loss"``, the sum of the layers' squared relative errors times their parameters.
        energy: Fraction of each weight's squared norm to retain under the metric, in (0, 1).
        error: Largest relative error of each weight under the metric, in (0, 1).
        max_bytes: What the whole model's parameters and buffers may take; a file adds their names to that,
            a hundred bytes or so for each tensor.
        speedup: Dense latency over compressed latency of the whole model, above 1, measured here and now.
        inputs: What the model is called with to measure that, or to check ``overrule``: a batch, as in
            ``data``.
        latencies: A table of measured layers to use again, and to add to.
        data: What to calibrate on, as for `lowrank.calibrate`. Without data the error is that of the
            weights alone, which costs far more accuracy.
        tokenizer: A tokenizer of transformers, for data that are strings.
        loss: As for `lowrank.calibrate`.
        stats: Statistics from `lowrank.calibrate`, in place of ``data``; with ``sequential``, beside them.
        metric: What the error measures: ``"weight"``, ``"diagonal"``, ``"inputs"`` or ``"loss"``;
            ``"auto"`` takes the last that the statistics allow, and ``"weight"`` without any.
        add_bias: Whether a factorized layer may get a bias where the dense one has none. It takes up
            the mean of the error; a bias that exists always does so under a calibrated metric.
        targets: Unix-style patterns of the layers to factorize; by default all but the heads.
        ignore: Patterns of layers to leave alone.
        overrule: Patterns of layers that may change although reading the model's code leaves a doubt: their
            weight seems to be read by value, or they are of a subclass of `torch.nn.Linear`. Subclasses are
            run on random numbers first; for weights that seem to be read, the model is run on ``inputs``, or
            on the first batch of ``data``, with and without them.
        allocation: ``"global"``, or ``"uniform"`` to keep the same fraction of each layer.
        round_to: Ranks that are chosen, not given, are multiples of this; under ``"int4"`` all are multiples
            of its groups.
        share: ``"inputs"`` lets layers that read the same input (queries, keys and values; gate and up
            projections) share their first factor, where that is predicted to lose less at the same size;
            with a ``rank``, where all that read an input get the same one. Calibration sees which they are.
            ``"layers"`` lets layers of one role in adjacent blocks (the queries of blocks 2 and 3) share it
            as a common basis; with a ``rank``, wherever they get the same one.
        share_size: How many adjacent blocks share a basis, at least 2; by default pairs or fours, whichever
            is predicted to lose less (pairs with a ``rank``).
        quantize: ``"int8"`` or ``"int4"`` stores factors, dense layers and embeddings as integers afterwards,
            whatever ``targets`` names; `lowrank.quantize` does the same with more options. ``"auto"``, with
            ``max_bytes``, chooses for each layer whether it stays, is factorized, is coded, or both, by the
            predicted increase of the loss; all else is coded as int8.
        group_size: Elements that share a scale under ``"int4"``; 32 by default.
        correction: Let the factors correct what the codes of a weight have lost, ``W ≈ Q + LR``, in place of
            replacing it; the factors are int8. For a ``rank`` or ``max_bytes``, with ``quantize="int4"``, or
            ``"int8"``, which leaves little to correct.
        sequential: Go through the model block by block on ``data``, and let each block make up for what
            was lost before it. Costs some six forward passes more, and no gradients.
        offload_folder: A folder on a disk, for the hidden states of all data that this needs; by default they
            stay in memory, twice tokens × hidden size.
        on_missing_kernel: What to do about int4 weights without a kernel, as in `quantize`.
        tolerance: Largest relative excess over each layer's optimal error, proven or measured.
        seed: Seed of the randomized solver; the global random state is not touched.
        progress: Show progress bars on a terminal.

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
    budget = Budget.of(rank=rank, keep=keep, energy=energy, error=error, max_bytes=max_bytes, speedup=speedup)
    request = Request(
        budget=budget,
        metric=metric,
        add_bias=add_bias,
        targets=targets,
        ignore=ignore,
        overrule=overrule,
        allocation=allocation,
        round_to=round_to,
        tolerance=tolerance,
        share=share,
        share_size=share_size,
        quantize=quantize,
        group_size=group_size,
        correction=correction,
    )
    if sequential and (correction or quantize == "auto"):
        raise BudgetError(
            "sequential=True fits factors that replace weights, not corrections: leave one out."
        )
    equal = not sequential  # blocks are gone through one by one
    heads = known_heads(model)  # a bad request fails before the work of calibrating
    layers = drafted(model, request, stats, heads, equal=equal)
    if sequential and data is None:
        raise DataError("sequential=True goes through data once more: give data=.")
    check_offload_folder(sequential, offload_folder)
    check_targeted(model, layers, request, heads)
    if (sequential or overrule) and isinstance(data, Iterator):
        data = list(data)  # to be gone through twice
    check_overruled(model, layers, inputs, data, tokenizer)
    if data is not None and stats is not None and not sequential:
        raise LowRankError("Give either data or stats, not both. Add statistics of more data with +.")
    if stats is not None:
        warn_of_few_tokens(stats)
    elif data is not None:
        stats = calibrate(
            *(model, data, tokenizer, loss),
            targets=targets,
            ignore=ignore,
            overrule=overrule,
            seed=seed,
            progress=progress,
        )
        layers = drafted(model, request, stats, heads, equal=equal)
        check_targeted(model, layers, request, heads)  # statistics may lack what was targeted
    predict = budget.name != "rank"  # a given rank decides nothing by its error: spare the spectra
    timing = Timing(inputs, latencies)
    chosen = with_reach(model, decided(model, layers, request, stats, predict, progress, timing))
    if targets is None and ignore is None and chosen.reachable_fraction < REACH_TO_WARN_BELOW:
        warn(chosen.small_reach(), ReachWarning)
    apply(
        model,
        chosen,
        stats,
        sequential=sequential,
        data=data if sequential else None,
        tokenizer=tokenizer,
        offload_folder=offload_folder,
        on_missing_kernel=on_missing_kernel,
        seed=seed,
        progress=progress,
    )
    return model


@accepts(scheme=text(SchemeError), stats=_STATS, on_missing_kernel=_SLOW, seed=SEED, progress=flag)
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
    """Code the weights of linear layers, factors and embeddings as integers, in place.

    Args:
        model: Any module, compressed or not. Call it again with other ``targets`` to mix schemes.
        scheme: ``"int8"``: one scale per row; linear layers multiply integers by integers. ``"int4"``: one
            scale per group of a row, 4.5 bits per weight; PyTorch's int4 kernels multiply the few tokens of
            a text that is being generated, and the decoded weight multiplies many.
        group_size: Elements that share a scale under ``"int4"``; 32 by default.
        targets: Unix-style patterns of linear layers and embeddings, as `report` and ``named_modules`` call
            them; a factorized layer stands for both of its factors. By default all but the heads.
        ignore: Patterns to leave alone.
        stats: Statistics of the dense model, from `calibrate`: layers then scale and shift their inputs
            so that integers lose less.
        on_missing_kernel: What to do where int4 weights of linear layers have no kernel on the model's
            device, and are decoded at every call: ``"warn"`` (`SlowKernelWarning`), ``"refuse"`` or
            ``"allow"``.
        seed: Of the rotation between factors; the global random state is not touched.
        progress: Show a progress bar on a terminal.

    Returns:
        The same model. Weights that are tied otherwise than a head to its table, used twice or read by value
        stay as they are.

    Raises:
        SchemeError: If the scheme is unknown, a weight does not divide into its groups, or int4 has no
            kernel and ``on_missing_kernel="refuse"``.
        WeightError: If a weight is not finite.
        TargetError: If a pattern matches nothing, or names what cannot be coded.
        LowRankError: If nothing is left to code. The model is then as before.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
        >>> quantize(model)
        Sequential(
          (0): QuantizedEmbedding(10, 64, int8)
          (1): QuantizedLinear(in_features=64, out_features=64, int8, bias=True)
        )
    """
    found = draft(check_model(model))
    hf = plugin()
    done = hf.recorded(model) if hf is not None else None
    known = done.carried_out(found) if done is not None else found
    plan = quantized_plan(model, known, Scheme(scheme, group_size), targets, ignore, stats)
    return apply(model, plan, stats, on_missing_kernel=on_missing_kernel, seed=seed, progress=progress)


@accepts(
    tokenizer=optional(function),
    device=optional(device),
    batch_size=whole(1),
    max_length=optional(whole(1)),
    seed=SEED,
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
            (`lowrank.calibration.objectives`).
            A function ``loss(outputs, batch)`` returns a scalar, the mean over the batch's samples.
            ``None`` spares the backward pass; the metric ``"loss"`` is then not available.
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
        TargetError: If no layer is left to calibrate: all are coded already, for instance.

    Source: for the gradients, Martens & Grosse 2015 (K-FAC, arXiv:1503.05671).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> stats = calibrate(model, [torch.randn(32, 8), torch.randn(32, 8)])
        >>> stats.tokens, sorted(stats.gradients)
        (64, ['0', '2'])
    """
    request = Request(metric="weight", targets=targets, ignore=ignore, overrule=overrule)
    layers = drafted(model, request, None, known_heads(model), embeddings=True)
    stream = stream_of(model, data, tokenizer, device, batch_size, max_length)
    names = [layer.name for layer in layers.targeted]
    names += [name for name in layers.owners if not isinstance(model.get_submodule(name), TiedLinear)]
    if not names:
        raise TargetError("\n".join([f"No layer of {layers.model} is there to calibrate.", *reasons(layers)]))
    heads = {layer.name: layer.tied_to for layer in layers if layer.tied_to is not None}
    return collect(model, names, stream, loss, heads=heads, tokenizer=tokenizer, seed=seed, progress=progress)


@accepts(**_REQUEST)
def plan(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_bytes: int | None = None,
    speedup: float | None = None,
    inputs: Any = None,
    latencies: LatencyTable | None = None,
    stats: Stats | None = None,
    metric: str = "auto",
    add_bias: bool = False,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    overrule: Sequence[str] | None = None,
    allocation: str = "global",
    round_to: int = 8,
    share: str | None = None,
    share_size: int | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    correction: bool = False,
    tolerance: float = 1e-3,
    progress: bool = False,
) -> Plan:
    """Decide each layer's rank and form, and predict its error, without changing the model.

    The arguments are those of `compress`.

    Returns:
        A `Plan`: print it, save it, edit it (`Plan.with_rank`), compare it (`Plan.diff`), `apply` it.

    Raises:
        LowRankError: If anything is wrong with the request or the model.
    """
    budget = Budget.of(rank=rank, keep=keep, energy=energy, error=error, max_bytes=max_bytes, speedup=speedup)
    request = Request(
        budget=budget,
        metric=metric,
        add_bias=add_bias,
        targets=targets,
        ignore=ignore,
        overrule=overrule,
        allocation=allocation,
        round_to=round_to,
        tolerance=tolerance,
        share=share,
        share_size=share_size,
        quantize=quantize,
        group_size=group_size,
        correction=correction,
    )
    heads = known_heads(model)
    layers = drafted(model, request, stats, heads)
    if stats is not None:
        warn_of_few_tokens(stats)
    check_targeted(model, layers, request, heads)
    check_overruled(model, layers, inputs)
    chosen = decided(model, layers, request, stats, True, progress, Timing(inputs, latencies))
    return with_reach(model, chosen)


@accepts(
    plan=instance(Plan, "a Plan, from plan(model, ...)", PlanError),
    stats=_STATS,
    on_missing_kernel=_SLOW,
    progress=flag,
    **_DATA,
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
    """Replace every layer that ``plan`` gives a rank by its factors, in place; then code what it codes.

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
    check_model(model)
    hf = plugin()
    if hf is not None:
        hf.check_unquantized(model)
    quantization_targets.check_kernels(model, plan, on_missing_kernel)
    check_subclasses(model, plan)
    try:
        if data is None:
            replacement.apply(model, plan, stats, seed=seed, progress=progress)
        else:
            there = Path(offload_folder) if offload_folder is not None else None
            stream = stream_of(model, data, tokenizer, batch_size=enough_batches(data))
            fitted = apply_anchored(
                model, plan, stats, stream, seed=seed, offload_folder=there, progress=progress
            )
            replacement.quantize_weights(model, plan, stats, seed=seed, progress=progress)
            plan = plan.with_layers(
                {name: replace(plan[name], reason=f"{plan[name].reason}; fitted anew") for name in fitted}
            )
    except LowRankError:
        raise  # nothing has changed
    except BaseException:  # an interrupt: what is done is done, and can be saved
        if hf is not None:
            hf.record(model, plan)
        raise
    if hf is not None:
        hf.record(model, plan)
    return model


def decompress(model: nn.Module) -> nn.Module:
    """Multiply every factorized layer back into a dense one of its original type, in place.

    The outputs stay those of the compressed model, to rounding; the lost accuracy does not return.

    Returns:
        The same model.

    Raises:
        LowRankError: If the model is itself a factorized layer, or no module.
    """
    replacement.decompress(model)
    hf = plugin()
    if hf is not None:
        hf.record(model)
    return model


@accepts(stats=_STATS, metric=text(BudgetError), add_bias=flag, progress=flag)
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
    request = Request(metric=metric, add_bias=add_bias, targets=targets, ignore=ignore)
    layers = drafted(model, request, stats, known_heads(model))
    return error_curves_of(model, layers, pooled(stats, layers), progress)

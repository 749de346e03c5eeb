"""`apply`: carry out a plan; `decompress`: undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lowrank.adapter import adapter, inspect
from lowrank.arguments import (
    SEED,
    accepts,
    choice,
    flag,
    function,
    instance,
    optional,
    path,
)
from lowrank.calibration.statistics import Stats
from lowrank.config.compression import ON_MISSING_KERNEL
from lowrank.errors import DataError, PlanError, SchemeError
from lowrank.pipeline.stages import (
    STATS,
    carried_out,
    check_offload_folder,
)
from lowrank.plans.plan import Plan
from lowrank.surgery import replacement

if TYPE_CHECKING:
    pass


@accepts(
    plan=instance(Plan, "a Plan, from plan(model, ...)", PlanError),
    stats=STATS,
    sequential=flag,
    tokenizer=optional(function),
    offload_folder=optional(path(DataError)),
    on_missing_kernel=choice(ON_MISSING_KERNEL, SchemeError),
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

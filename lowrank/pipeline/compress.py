"""`compress`: everything in one call; `plan`: what it would do. Both inspect → calibrate → decide.

Read `compress` first: the stages in order. What is between them stands in `lowrank.pipeline.stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowrank.adapter import inspect
from lowrank.allocation.latency import LatencyTable
from lowrank.allocation.planner import Latencies, check_targeted, drafted
from lowrank.arguments import (
    Check,
    accepts,
    flag,
    function,
    instance,
    optional,
)
from lowrank.calibration.cross_fitting import warn_of_few_tokens
from lowrank.calibration.statistics import Stats
from lowrank.config import CompressionConfig, configured, documented
from lowrank.errors import BudgetError, DataError, LowRankError, ReachWarning, warn
from lowrank.inspection.unplanned import with_reach
from lowrank.pipeline.stages import (
    STATS,
    calibrated,
    carried_out,
    check_offload_folder,
    check_overruled,
    decided,
    stream_of,
)
from lowrank.plans.plan import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowrank.config import CompressionOptions, PlanOptions

_ASKED: dict[str, Check] = {
    "latencies": optional(instance(LatencyTable, "a LatencyTable", BudgetError)),
    "stats": STATS,
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
        latencies: An embedding of measured layers to use again, and to add to.
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
    if (config.sequential or config.overrule or config.removes_neurons) and isinstance(data, Iterator):
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
    if config.removes_neurons and inputs is None and data is not None:
        inputs = next(stream_of(model, data, tokenizer)).given
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
        latencies: An embedding of measured layers to use again, and to add to.
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

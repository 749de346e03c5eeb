"""Make factorized layers from dense ones, one by one; nothing in the model changes here.

Under a calibrated metric the bias takes up the mean of the error: ``b' = b + (W − LR) μ``. That is
why the metric's second moment is centred. Source: DRONE (Chen et al. 2021) for the factors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.errors import PlanError, StatsError
from lowrank.fingerprints import fingerprint_of_layer
from lowrank.linalg import Metric, truncated_svd
from lowrank.nn import LowRankLinear, kind_of
from lowrank.planning import LayerPlan, Plan
from lowrank.statistics import Stats


def check_stats(model: nn.Module, plan: Plan, stats: Stats | None) -> None:
    """Check that ``stats`` are what the plan's metric needs.

    Raises:
        PlanError: If the metric needs statistics and there are none.
        StatsError: If they are of another model, or lack a layer.
    """
    if plan.metric == "weight":
        return
    if stats is None:
        raise PlanError(
            f"The plan's metric is {plan.metric!r}, which needs statistics: pass "
            "stats=calibrate(model, data)."
        )
    for layer in plan.factorized:
        module = model.get_submodule(layer.name)
        if not isinstance(module, LowRankLinear):  # done already
            check_layer_of(module, layer.name, stats)
            stats.metric(layer.name, plan.metric, layer.has_bias)


def check_layer_of(layer: nn.Module, name: str, stats: Stats) -> None:
    """Refuse statistics of another model.

    Raises:
        StatsError: If the layer's weight is not the one that was calibrated.
    """
    if stats.fingerprint.layers.get(name) not in (None, fingerprint_of_layer(layer)):
        raise StatsError(
            f"{name}: the statistics are of another model, or of other weights. Calibrate this model, as it "
            "is now."
        )


def metric_of(layer: LayerPlan, metric: str, stats: Stats | None) -> Metric:
    """Return the metric under which ``layer`` is decomposed."""
    return stats.metric(layer.name, metric, layer.has_bias) if stats is not None else Metric()


def factorized(
    dense: nn.Module, layer: LayerPlan, plan: Plan, stats: Stats | None = None, seed: int = 0
) -> LowRankLinear:
    """Return the factorized form of one dense layer; the bias stays the same parameter.

    Args:
        dense: The layer, of a kind that `lowrank.nn` knows.
        layer: Its entry in ``plan``, with a rank.
        plan: Gives the metric and the tolerance.
        stats: The statistics, unless the metric is ``"weight"``.
        seed: Seed of the randomized solver.
    """
    kind = kind_of(dense)
    assert kind is not None  # checked before the first layer changes
    assert layer.rank is not None
    weight = kind.weight(dense)
    metric = metric_of(layer, plan.metric, stats)
    left, right, error, _ = truncated_svd(weight, layer.rank, metric, tolerance=plan.tolerance, seed=seed)
    bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
    if stats is not None and plan.metric != "weight" and layer.has_bias:
        bias = _corrected(bias, weight, left, right, stats.moments(layer.name).mean)
    return LowRankLinear.from_factors(
        left, right, bias, kind=kind.name, relative_error=error, added_bias=bias is not dense.bias
    )


def _corrected(
    bias: nn.Parameter | None, weight: Tensor, left: Tensor, right: Tensor, mean: Tensor
) -> nn.Parameter:
    """Add ``(W − LR) μ`` to the bias, in place where there is one."""
    mean = mean.to(weight.device)
    lost = weight.detach().double() @ mean - left.double() @ (right.double() @ mean)
    if bias is None:
        return nn.Parameter(lost.to(weight.dtype))
    with torch.no_grad():
        bias.copy_(bias.double() + lost)
    return bias

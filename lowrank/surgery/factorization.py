"""Make factorized layers and embeddings from dense ones, singly or jointly. No module is replaced here.

Under a calibrated metric the bias takes up the mean of the error: ``b' = b + (W − LR) μ``. That is
why the metric's second moment is centred. A bias that there is stays the same parameter, with new
values. Source: DRONE (Chen et al. 2021) for the factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank.calibration.statistics import Stats
from lowrank.errors import PlanError, StatsError, WeightError
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.tied_weights import pads_with_zeros
from lowrank.linalg import (
    Diagonal,
    ErrorCurve,
    Factors,
    Metric,
    PulledBack,
    SharedFactors,
    Stacked,
    joint_error_curves,
    quantize_with_correction,
    shared_basis,
    shared_basis_error_curves,
    smooth_scale_of,
    truncated_svd,
)
from lowrank.linalg.metric import Side, wide
from lowrank.linalg.svd import small_side_gram
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedLinear, TiedLinear, layer_type_of
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.plan import Plan
from lowrank.plans.stored_tensors import scheme_of


def check_stats(seen: Inspection, plan: Plan, stats: Stats | None) -> None:
    """Check that ``stats`` are what the plan's metric needs.

    Raises:
        PlanError: If the metric needs statistics and there are none.
        StatsError: If they are of another model, or lack a layer.
    """
    factors = LowRankLinear, LowRankEmbedding
    dense = {x.name for x in plan.factorized if not isinstance(seen.model.get_submodule(x.name), factors)}
    shared = [
        layers
        for layers in plan.shared.values()
        if layers[-1].same_input and dense.issuperset(layer.name for layer in layers)
    ]
    if plan.metric == "weight" and not shared:
        return
    if stats is None:
        raise PlanError(
            f"The plan's metric is {plan.metric!r}{', with shared factors' if shared else ''}, which "
            "needs statistics: pass stats=calibrate(model, data)."
        )
    for layer in plan.factorized:
        if layer.name in dense:
            stats.metric(layer.name, plan.metric, layer.has_bias)
            for each in (layer, *plan.equal.get(layer.name, ())):
                module = seen.model.get_submodule(each.name)
                check_same_weight(seen, each.name, stats)
                if not layer.is_embedding:
                    check_mean(module, each, stats.moments(each.name).mean)
    for layers in shared:
        if len({stats.sources.get(layer.name, layer.name) for layer in layers}) > 1:
            raise StatsError(
                f"{layers[-1].name}: cannot share down with {layers[0].name}: by the statistics they do not "
                "read the same input."
            )


def check_mean(dense: nn.Module, layer: LayerPlan, mean: Tensor) -> None:
    """Refuse a layer whose bias could not take up the mean of an error, since its mean output overflows.

    Raises:
        WeightError: If the layer has a bias, or will, and its dtype does not hold ``Wμ + b``.
    """
    if not layer.has_bias:
        return
    weight = wide(weight_of(dense).detach())
    output = weight @ mean.to(weight)
    bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
    output = output if bias is None else output + bias.detach()
    dtype = weight_of(dense).dtype
    if not bool(output.to(dtype).isfinite().all()):
        raise WeightError(
            f"{layer.name}: for the mean of what it reads it returns values that {dtype} cannot hold. Scale "
            "its weights or its inputs, or leave it out with ignore=."
        )


def check_same_weight(seen: Inspection, name: str, stats: Stats) -> None:
    """Refuse statistics of another model.

    Raises:
        StatsError: If the layer's weight is not the one that was calibrated.
    """
    if stats.fingerprint.layers.get(name) not in (None, seen.fingerprint(name)):
        raise StatsError(
            f"{name}: the statistics are of another model, or of other weights. Calibrate this model, as it "
            "is now."
        )


def merged(stats: Stats | None, plan: Plan, centred: bool = True) -> Stats | None:
    """Return ``stats`` in which a layer whose weight others use stands for all of them.

    Where one of them is not in the statistics, the owner stands for itself. Without ``centred``, moments are
    about zero, as codes that serve several layers need them.
    """
    for owner, users in plan.equal.items():
        layers = plan[owner], *users
        if stats is not None and all(layer.name in stats for layer in layers):
            stats = stats.merged(owner, {layer.name: centred and layer.has_bias for layer in layers})
    return stats


def metric_of(layer: LayerPlan, metric: str, stats: Stats | None) -> Metric:
    """Return the metric under which ``layer`` is decomposed."""
    return stats.metric(layer.name, metric, layer.has_bias) if stats is not None else Metric()


def joint_errors(
    layers: Sequence[LayerPlan],
    weights: Sequence[Tensor],
    metric: str,
    stats: Stats | None,
    estimate: bool = False,
) -> tuple[ErrorCurve, ...]:
    """Return the error of each layer at every rank of the first factor that they would share.

    Args:
        layers: Their entries in the plan; the first one owns the factor.
        weights: Their weights ``(out, in)``.
        metric: One of `lowrank.config.METRICS`.
        stats: The statistics, unless the metric is ``"weight"``.
        estimate: Whether errors may be estimates where bounds are known
            (`lowrank.linalg.shared_basis_error_curves`).
    """
    each, scales = _metrics_and_scales(layers, weights, metric, stats)
    if _one_metric_of_inputs(layers, metric):
        return joint_error_curves(weights, *_stacked(weights, each, scales))
    return shared_basis_error_curves(weights, each, scales, refined=estimate)


def _one_metric_of_inputs(layers: Sequence[LayerPlan], metric: str) -> bool:
    return metric == "weight" or layers[-1].same_input


def _metrics_and_scales(
    layers: Sequence[LayerPlan], weights: Sequence[Tensor], metric: str, stats: Stats | None
) -> tuple[list[Metric], list[float]]:
    """Return each layer's metric, and how much its squared error counts: as it does for the solver."""
    each = [metric_of(layer, metric, stats) for layer in layers]
    scales = []
    for layer, weight, own in zip(layers, weights, each, strict=True):
        total = float(small_side_gram(weight.detach().to(torch.float64), own).trace())
        known = None
        if stats is not None and metric == "loss":
            known = stats.loss_per_square(layer.name) * stats.held_out_ratio(layer.name)
        scales.append(importance(layer, total, known))
    return each, scales


def _stacked(
    weights: Sequence[Tensor], each: Sequence[Metric], scales: Sequence[float]
) -> tuple[Side, Stacked]:
    """Return the metric under which layers that read the same input are decomposed together."""
    sizes = tuple(len(weight) for weight in weights)
    return each[0].inputs, Stacked(tuple(own.outputs for own in each), sizes, tuple(scales))


def factorized(
    dense: nn.Module, layer: LayerPlan, plan: Plan, stats: Stats | None = None, seed: int = 0
) -> LowRankLinear | LowRankEmbedding:
    """Return the factorized form of one dense layer or embedding; the bias stays the same parameter.

    Args:
        dense: The layer, of a kind that `lowrank.nn` knows, or the embedding.
        layer: Its entry in ``plan``, with a rank.
        plan: Gives the metric and the tolerance.
        stats: The statistics, unless the metric is ``"weight"``.
        seed: Seed of the randomized solver.
    """
    assert layer.rank is not None
    metric = metric_of(layer, plan.metric, stats)
    matrix = matrix_of(dense, layer, metric)
    found = truncated_svd(matrix, layer.rank, metric, tolerance=plan.tolerance, seed=seed)
    if isinstance(dense, nn.Embedding):
        return _embedding(dense, layer, found, metric)
    return _layer(dense, layer, found.left, found.right, found.relative_error, plan, stats)


def corrected(
    dense: nn.Module,
    layer: LayerPlan,
    stored: QuantizedWeight,
    plan: Plan,
    stats: Stats | None = None,
    seed: int = 0,
) -> LowRankLinear:
    """Return a dense layer with its weight quantized, and factors that correct what the codes lost.

    The arguments are those of `factorized`; ``stored`` says how the weight is quantized.
    """
    assert layer.rank is not None
    scheme = scheme_of(stored)
    weight = weight_of(dense).detach()
    metric = error_metric_of(layer, weight, plan.metric, stats)
    moments = input_moments(stats, layer) if plan.metric != "weight" else None
    smooth_scale = None
    if stored.smooth_scale:
        assert stats is not None  # checked
        smooth_scale = smooth_scale_of(weight, stats.moments(layer.name).variances(layer.has_bias))
    found = quantize_with_correction(
        *(weight, layer.rank, scheme, metric, moments),
        smooth_scale=smooth_scale,
        tolerance=plan.tolerance,
        seed=seed,
    )
    base = QuantizedLinear.from_codes(found.codes, found.scale, scheme, weight.dtype, smooth_scale)
    left, right = found.left.to(weight.dtype), found.right.to(weight.dtype)
    return _layer(dense, layer, left, right, found.relative_error, plan, stats, base=base)


def error_metric_of(layer: LayerPlan, weight: Tensor, metric: str, stats: Stats | None) -> Metric:
    """Return the metric of ``layer`` in a form that can measure other matrices than its weight.

    Of a tall layer only ``Wᵀ G W`` is known. A multiple of the identity stands for its ``G``, the one that
    gives the weight the same norm.
    """
    found = metric_of(layer, metric, stats)
    if not isinstance(found.outputs, PulledBack):
        return found
    plain = Metric(found.inputs)
    norm = plain.squared_norm(weight)
    scale = float(small_side_gram(weight.to(torch.float64), found).trace()) / norm if norm > 0 else 0.0
    ones = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    return Metric(found.inputs, Diagonal(scale * ones))


def input_moments(stats: Stats | None, layer: LayerPlan) -> Tensor | None:
    """Return the moments by which a layer's codes are rounded, if more than a diagonal is known."""
    if stats is None:
        return None
    second = stats.moments(layer.name).second(layer.has_bias)
    return second if second.ndim == 2 else None


def jointly_factorized(
    dense: Sequence[nn.Module], layers: Sequence[LayerPlan], plan: Plan, stats: Stats | None, seed: int = 0
) -> list[LowRankLinear]:
    """Return the factorized forms of layers that share a ``down``, which is the first one's.

    The arguments are those of `factorized`.
    """
    lefts, right, errors = _joint_factors(layers, [weight_of(module) for module in dense], plan, stats, seed)
    made: list[LowRankLinear] = []
    for module, layer, left, error in zip(dense, layers, lefts, errors, strict=True):
        new = _layer(module, layer, left, right, error, plan, stats, shared=True)
        if made:
            new.share_down_with(made[0], layer.same_input)
        made.append(new)
    return made


def _joint_factors(
    layers: Sequence[LayerPlan], weights: Sequence[Tensor], plan: Plan, stats: Stats | None, seed: int
) -> SharedFactors:
    rank = layers[0].rank
    assert rank is not None
    each, scales = _metrics_and_scales(layers, weights, plan.metric, stats)
    if not _one_metric_of_inputs(layers, plan.metric):
        return shared_basis(weights, rank, each, scales, none_worse=plan.bounds_errors)
    inputs, outputs = _stacked(weights, each, scales)
    stack = torch.cat([weight.detach() for weight in weights])
    left, right, *_ = truncated_svd(stack, rank, Metric(inputs, outputs), tolerance=plan.tolerance, seed=seed)
    errors = tuple(
        error_curve.relative_error(rank) for error_curve in joint_error_curves(weights, inputs, outputs)
    )
    return SharedFactors(tuple(part.contiguous() for part in outputs.split(left)), right, errors)


def weight_of(dense: nn.Module) -> Tensor:
    """Return the weight ``(out, in)`` of a layer that can be factorized, or of an embedding."""
    if isinstance(dense, nn.Embedding):
        return dense.weight
    layer_type = layer_type_of(dense)
    assert layer_type is not None  # drafted as a target
    return layer_type.weight(dense)


def matrix_of(dense: nn.Module, layer: LayerPlan, metric: Metric) -> Tensor:
    """Return what the factors are to approximate: the weight; of a centred embedding, less its mean row."""
    weight = weight_of(dense).detach()
    if not layer.is_embedding or not layer.has_bias:
        return weight
    return weight - _mean_row(weight, metric)


def _mean_row(embedding: Tensor, metric: Metric) -> Tensor:
    """Return the mean of the rows, by the weights that they have under ``metric``."""
    rows = embedding.detach().double()
    if not isinstance(metric.outputs, Diagonal):
        return rows.mean(0).to(embedding.dtype)
    weights = metric.outputs.values.to(rows)
    return (weights @ rows / weights.sum()).to(embedding.dtype)


def _embedding(dense: nn.Embedding, layer: LayerPlan, found: Factors, metric: Metric) -> LowRankEmbedding:
    """Wrap the factors of an embedding; a padding row of zeros stays zero, to the bit."""
    left = found.left
    if pads_with_zeros(dense):
        left[dense.padding_idx] = 0.0
    bias = nn.Parameter(_mean_row(dense.weight, metric)) if layer.has_bias else None
    return LowRankEmbedding.from_factors(
        left, found.right, bias, padding_idx=dense.padding_idx, relative_error=found.relative_error
    )


def _layer(
    dense: nn.Module,
    layer: LayerPlan,
    left: Tensor,
    right: Tensor,
    error: float,
    plan: Plan,
    stats: Stats | None,
    shared: bool = False,
    base: QuantizedLinear | None = None,
) -> LowRankLinear:
    """Wrap factors, and what they correct if anything, with the bias corrected under a calibrated metric."""
    bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
    if stats is not None and plan.metric != "weight" and layer.has_bias:
        lost = _lost(dense, left, right, base)
        bias = _with_mean(bias, lost, stats.moments(layer.name).mean, left.dtype)
    return LowRankLinear.from_factors(
        left,
        right,
        bias,
        layer_type=layer.layer_type,
        shared=shared,
        relative_error=error,
        added_bias=bias is not dense.bias,
        base=base,
    )


def follower(
    dense: nn.Module, owner: LowRankLinear, layer: LayerPlan, plan: Plan, stats: Stats | None
) -> TiedLinear:
    """Return what takes the place of ``dense``, whose weight ``owner`` has factorized.

    Its bias takes up the mean of its own error, since it reads another input than the owner.
    """
    bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
    if stats is not None and plan.metric != "weight" and bias is not None:
        lost = _lost(dense, owner.up.weight.detach(), owner.down.weight.detach(), owner.base)
        bias = _with_mean(bias, lost, stats.moments(layer.name).mean, bias.dtype)
    return TiedLinear(owner, bias, layer_type=layer.layer_type, was_copy=layer.was_copy)


def _lost(dense: nn.Module, left: Tensor, right: Tensor, base: QuantizedLinear | None) -> Tensor:
    """Return ``W − LR``, less what the factors correct, ``(out, in)`` in float64."""
    lost = weight_of(dense).detach().double() - left.double() @ right.double()
    return lost if base is None else lost - base.dense_weight().double()


def _with_mean(bias: nn.Parameter | None, lost: Tensor, mean: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Add ``(W − LR) μ``, with the first factor in ``lost``, to the bias, in place where there is one."""
    constant = lost @ mean.to(lost.device)
    if bias is None:
        return nn.Parameter(constant.to(dtype))
    with torch.no_grad():
        bias.copy_(bias.double() + constant)
    return bias


def importance(layer: LayerPlan, squared_norm: float, loss_per_square: float | None) -> float:
    """Return how much a squared error of ``layer`` counts beside those of other layers.

    Under the metric ``"loss"`` that is the factor to the loss. Else each weight counts as if scaled to
    unit mean square: absolute errors would follow the arbitrary scale of a layer, and relative ones
    alone would count a small layer like a large one.

    Args:
        layer: The layer.
        squared_norm: Of its weight under the metric.
        loss_per_square: The factor to the loss, if there is one.
    """
    if loss_per_square is not None:
        return loss_per_square
    return layer.dense_parameters / squared_norm if squared_norm > 0 else 0.0

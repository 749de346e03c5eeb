"""Make narrower layers from those of feed-forward blocks; no module is replaced here.

The writers lose rows of their weights. The reader loses columns, and those that remain are fitted anew. Under
a calibrated metric its bias takes up the mean of the error, ``b' = b + W μ − W' μ_S``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.calibration.statistics import Stats
from lowrank.errors import PlanError, WeightError
from lowrank.inspection.inspection import Inspection
from lowrank.linalg.neurons import neuron_removal, refitted
from lowrank.linalg.svd import checked_weight
from lowrank.nn import QuantizedLinear, features_before, layer_type_of, narrower_layer
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan
from lowrank.surgery.factorization import check_mean, check_same_weight, metric_of, weight_of


class Narrower(NamedTuple):
    """A layer that is to take the place of one.

    Args:
        name: The name of that one.
        layer: The narrower layer; the bias of a reader is the same parameter.
        bias: New values of that bias; ``None`` where it keeps its own.
        kept: Which inputs remain of a reader; ``None`` of a writer.
    """

    name: str
    layer: nn.Module
    bias: Tensor | None = None
    kept: Tensor | None = None


def layers_to_narrow(
    seen: Inspection, plan: Plan, blocked: Mapping[str, str], loading: bool = False
) -> list[LayerPlan]:
    """Return the layers that ``plan`` narrows; those are left out that are as planned already.

    Raises:
        PlanError: If a layer is missing, has another shape, must stay as it is, or does not go with the
            others of its block.
    """
    todo = []
    modules = dict(seen.model.named_modules())
    for layer in plan:
        if not layer.is_narrower:
            continue
        module = modules.get(layer.name)
        if module is not None and features_before(module) is not None and _shape(module) == layer.kept_shape:
            continue
        layer_type = None if module is None else layer_type_of(module)
        if module is None or layer_type is None or layer_type.name != layer.layer_type:
            found = "no such layer" if module is None else f"a {type(module).__name__} there"
            raise PlanError(
                f"{layer.name}: is to lose neurons of a {layer.layer_type}, and {type(seen.model).__name__} "
                f"has {found}. Make a plan for this model."
            )
        shape = _shape(module)
        if shape != (layer.out_features, layer.in_features):
            raise PlanError(
                f"{layer.name}: the plan is for a weight (out={layer.out_features}, in={layer.in_features}), "
                f"the model's is (out={shape[0]}, in={shape[1]}). Make a plan for this model."
            )
        if layer.name in blocked:
            raise PlanError(f"{layer.name}: cannot lose neurons: it {blocked[layer.name]}.")
        todo.append(layer)
    if not loading:
        _check_blocks(plan, todo)
    return todo


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a linear layer, which may be quantized."""
    if isinstance(layer, QuantizedLinear):
        return layer.shape
    rows, columns = weight_of(layer).shape
    return rows, columns


def check_statistics(seen: Inspection, plan: Plan, todo: list[LayerPlan], stats: Stats | None) -> None:
    """Check that the weights are finite, and that ``stats`` are what the plan's metric needs of the readers.

    Raises:
        WeightError: If a weight is not finite.
        PlanError: If there are no statistics, or only diagonal ones, where the metric needs them.
        StatsError: If they are of another model, or lack a reader.
    """
    for layer in todo:
        module = seen.model.get_submodule(layer.name)
        try:
            checked_weight(weight_of(module))
        except WeightError as error:
            raise type(error)(f"{layer.name}: {error}") from error
        if layer.kept_inputs is None or plan.metric == "weight":
            continue
        if stats is None:
            raise PlanError(
                f"The plan's metric is {plan.metric!r}, which needs statistics: pass "
                "stats=calibrate(model, data)."
            )
        stats.metric(layer.name, plan.metric, layer.bias)
        check_same_weight(seen, layer.name, stats)
        check_mean(module, layer, stats.moments(layer.name).mean)


def _check_blocks(plan: Plan, todo: list[LayerPlan]) -> None:
    """Check that the layers of each block lose the same number of neurons."""
    for layer in todo:
        if layer.kept_outputs is not None:
            reader = plan[layer.feeds] if layer.feeds is not None and layer.feeds in plan else None
            if reader is None or reader.kept_inputs != layer.kept_outputs:
                raise PlanError(
                    f"{layer.name}: is to keep {layer.kept_outputs} neurons, and "
                    f"{layer.feeds or 'no layer'}, which reads them, "
                    f"{'nothing of the plan' if reader is None else reader.kept_inputs or 'all'}. "
                    "All layers of a block keep the same number."
                )
            if reader.in_features != layer.out_features:
                raise PlanError(
                    f"{layer.name}: has {layer.out_features} outputs, and {reader.name}, which is to read "
                    f"them, {reader.in_features} inputs."
                )
        elif not any(other.feeds == layer.name for other in todo):
            raise PlanError(
                f"{layer.name}: is to lose inputs, and no layer of the plan is to lose them as outputs."
            )


def narrower_layers(
    model: nn.Module, plan: Plan, todo: list[LayerPlan], stats: Stats | None
) -> Iterator[Narrower]:
    """Make the layers that take the places of ``todo``, which `layers_to_narrow` has returned.

    Raises:
        WeightError: If a weight that was fitted anew leaves the range of its dtype; with the layer's name.
    """
    for reader in todo:
        if reader.kept_inputs is None:
            continue
        dense = model.get_submodule(reader.name)
        weight, metric = weight_of(dense).detach(), metric_of(reader, plan.metric, stats)
        kept = neuron_removal(weight, metric).kept(reader.kept_inputs).to(weight.device)
        fitted = refitted(weight, kept, metric.inputs)
        new = fitted.to(weight.dtype)
        bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
        values = None
        if bias is not None and stats is not None and plan.metric != "weight":
            mean = stats.moments(reader.name).mean.to(fitted)
            values = bias.detach().to(fitted) + weight.to(fitted) @ mean - fitted @ mean[kept]
            values = values.to(bias.dtype)
        if not bool(new.isfinite().all()) or (values is not None and not bool(values.isfinite().all())):
            raise WeightError(
                f"{reader.name}: fitted anew to {reader.kept_inputs} neurons, its weight leaves the range of "
                f"{weight.dtype}. Keep more neurons, or compress in float32."
            )
        yield Narrower(reader.name, _layer(dense, new, bias), values, kept)
        for writer in todo:
            if writer.feeds == reader.name:
                yield Narrower(writer.name, _with_rows(model.get_submodule(writer.name), kept))


def empty_layers(
    model: nn.Module, plan: Plan, device: torch.device | str = "meta"
) -> Iterator[tuple[str, nn.Module]]:
    """Make the layers that take the places of those that ``plan`` narrows, of zeros where there are data.

    Raises:
        PlanError: If one does not fit the model.
    """
    for layer in layers_to_narrow(Inspection(model), plan, {}, loading=True):
        dense = model.get_submodule(layer.name)
        bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
        rows, columns = layer.kept_shape
        if bias is not None and layer.kept_outputs is not None:
            bias = nn.Parameter(torch.zeros(rows, device=device, dtype=bias.dtype))
        weight = torch.zeros(rows, columns, device=device, dtype=weight_of(dense).dtype)
        yield layer.name, _layer(dense, weight, bias)


def statistics_of_kept(stats: Stats | None, kept: Mapping[str, Tensor]) -> Stats | None:
    """Return ``stats`` for layers that read only some of their inputs.

    Args:
        stats: Statistics of the model before, if there are any.
        kept: By layer name the indices of the inputs that remain, ``(width,)``, int64.
    """
    if stats is None:
        return None
    inputs, sources = dict(stats.inputs), dict(stats.sources)
    for name, indices in kept.items():
        if name in sources:
            inputs[f"{name}, narrower"] = stats.moments(name).of(indices.cpu())
            sources[name] = f"{name}, narrower"
    return replace(stats, inputs=inputs, sources=sources)


def _with_rows(dense: nn.Module, kept: Tensor) -> nn.Module:
    bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
    if bias is not None:
        bias = nn.Parameter(bias.detach()[kept.to(bias.device)].clone(), requires_grad=bias.requires_grad)
    weight = weight_of(dense).detach()
    return _layer(dense, weight[kept.to(weight.device)].clone(), bias)


def _layer(dense: nn.Module, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    layer_type = layer_type_of(dense)
    assert layer_type is not None  # of a layer that `layers_to_narrow` has returned
    rows, columns = weight_of(dense).shape
    return narrower_layer(layer_type, weight, bias, (rows, columns))

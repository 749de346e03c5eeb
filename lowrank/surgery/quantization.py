"""Make modules with integer weights from floating-point ones. Only `rotate` changes a model: its factors.

Inner dimensions are free to be rotated (``LR = (LO)(OᵀR)``), so before they are quantized, factors are
brought to orthonormal columns of ``L`` and then rotated at random. That spreads every outlier over all
components, and a rounding error of equal size in each does equal harm. Source of rotating before quantizing:
QuIP (Chee et al. 2023, arXiv:2307.13304) and QuaRot (Ashkboos et al. 2024, arXiv:2404.00456); between two
factors it costs nothing at inference. Statistics, where there are any, say how to scale and shift what a
layer reads (`lowrank.nn.quantized`), and how its inputs lie (`lowrank.linalg.quantize_weight`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.calibration.moments import Moments
from lowrank.calibration.statistics import Stats
from lowrank.errors import PlanError, StatsError, WeightError
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import described
from lowrank.linalg import Scheme, rotated, smooth_scale_of
from lowrank.linalg.svd import checked_weight
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    SharedDown,
    SharedQuantizedDown,
    layer_type_named,
    layer_type_of,
)
from lowrank.plans.layer_plan import EMBEDDING, LayerPlan, QuantizedWeight
from lowrank.plans.parts import ModulePart, modules_of, scheme_of
from lowrank.plans.plan import Plan
from lowrank.surgery.factorization import check_same_weight

PARTS = ("base", "down", "up")
"""What a `LowRankLinear` can hold that is quantized on its own, by its name within the layer."""


def base_of(plan: Plan, layer: LayerPlan) -> QuantizedWeight:
    """Return how the weight is quantized that the factors of ``layer`` correct.

    Raises:
        PlanError: If the plan does not say it.
    """
    name = f"{layer.name}.base"
    for stored in plan.quantized:
        if stored.name == name:
            return stored
    raise PlanError(
        f"{layer.name}: its factors are to correct a quantized weight, but the plan has no {name} among its "
        "quantized weights."
    )


def check_quantized_weights(
    seen: Inspection, plan: Plan, stats: Stats | None, blocked: Mapping[str, str], loading: bool = False
) -> None:
    """Check that every quantized weight of ``plan`` is a layer, embedding or factor of that shape.

    ``blocked`` tells what must stay as it is, from `lowrank.inspection.eligibility`.

    Raises:
        PlanError: If a module is missing, of another kind or shape, quantized otherwise, or must stay as it
            is; if statistics lack.
        WeightError: If a weight is not finite, or does not divide into groups.
        StatsError: If the statistics are of another model.
    """
    modules = dict(seen.model.named_modules())
    for layer in plan:
        if layer.correction:
            base_of(plan, layer)
    for stored in plan.quantized:
        module = modules.get(stored.name)
        if stored.name in plan and plan[stored.name].tied_to is not None:
            raise PlanError(
                f"{stored.name}: by the plan it uses the weight of {plan[stored.name].tied_to}. Quantize "
                "that."
            )
        try:
            scheme_of(stored)
            if not loading and module is not None and not isinstance(module, QuantizedModule):
                checked_weight(module.weight)  # type: ignore[arg-type]
            if not loading:
                check_range(modules, stored)
        except WeightError as error:
            raise type(error)(f"{stored.name}: {error}") from error
        if isinstance(module, QuantizedModule):
            if described(stored.name, module) != stored:
                raise PlanError(
                    f"{stored.name}: quantized already, and otherwise than the plan says ({stored.scheme}). "
                    "Call decompress(model) first, or start from the dense checkpoint."
                )
            continue
        if _module_after(modules, plan, stored.name) != (
            *(stored.name, stored.layer_type, stored.rows, stored.columns, stored.bias),
        ):
            raise PlanError(
                f"{stored.name}: the plan has a quantized {stored.layer_type} of shape ({stored.rows}, "
                f"{stored.columns}) "
                f"there, which does not fit {type(seen.model).__name__}."
            )
        if stored.name in blocked:
            raise PlanError(f"{stored.name}: this weight cannot be quantized: it {blocked[stored.name]}.")
        if stored.input_shift and _serves_several(stored, plan):
            raise PlanError(
                f"{stored.name}: cannot shift its inputs: several layers use it, with unlike inputs."
            )
        if stored.input_shift > stored.smooth_scale or stored.smooth_scale > (not stored.is_embedding):
            raise PlanError(
                f"{stored.name}: a {stored.layer_type} cannot be centred without being smooth, nor an "
                "embedding."
            )
        if stored.smooth_scale and not loading:
            _check_stats(stored, seen, plan, stats)


def _serves_several(stored: QuantizedWeight, plan: Plan) -> bool:
    """Tell whether several layers use the codes: the mean of one's inputs is not that of another's."""
    layer = stored.name.rpartition(".")[0]
    readers = (stored.name, layer, *(reader.name for reader in plan.shared.get(layer, ())))
    return any(name in plan.equal for name in readers)


def without_shared_input_shifts(plan: Plan) -> Plan:
    """Return ``plan`` with inputs centred only where one layer uses the weight."""
    quantized = (
        replace(stored, input_shift=False) if _serves_several(stored, plan) else stored
        for stored in plan.quantized
    )
    return replace(plan, quantized=tuple(quantized))


def check_range(modules: Mapping[str, nn.Module], stored: QuantizedWeight) -> None:
    """Refuse weights, or factors of weights, that ``stored``'s scheme cannot hold.

    Raises:
        WeightError: If a weight is not finite, or the scales cannot hold it.
        SchemeError: If the scheme is unknown, or does not divide the weight's rows.
    """
    parent, _, part = stored.name.rpartition(".")
    layer = modules.get(stored.name, modules.get(parent) if part in PARTS else None)
    weight = getattr(layer, "weight", None)
    scheme = scheme_of(stored)
    if (
        isinstance(weight, Tensor)
        and not isinstance(layer, QuantizedModule)
        and weight.numel()
        and not weight.is_meta
    ):
        checked_weight(weight)
        check_holds(scheme, weight)


def check_holds(scheme: Scheme | None, weight: Tensor) -> None:
    """Refuse a scheme for a weight that its scales cannot hold; a weight without data passes.

    Raises:
        WeightError: If they cannot.
    """
    if scheme is None or weight.is_meta or not weight.numel():
        return
    smallest, most = scheme.storage.smallest, scheme.storage.largest
    if (smallest, most) == (0.0, math.inf):
        return
    largest = float(weight.detach().abs().max())
    if largest and not smallest < largest < most:
        raise WeightError(
            f"its largest element is {largest:.2g}, and the scales of {scheme.name} are for weights from "
            f"{smallest:g} to {most:g}. Use int8, or ignore this layer."
        )


def _module_after(modules: Mapping[str, nn.Module], plan: Plan, name: str) -> ModulePart | None:
    """Return what will be called ``name`` once the layers are factorized, if it has a weight."""
    parent, _, part = name.rpartition(".")
    if part in PARTS and parent in plan and plan[parent].rank is not None:
        return modules_of(plan[parent]).get(part)
    module = modules.get(name)
    if module is None or (name in plan and plan[name].rank is not None):
        return None
    if isinstance(module, nn.Embedding):
        return ModulePart(name, EMBEDDING, module.num_embeddings, module.embedding_dim, False)
    layer_type = layer_type_of(module)
    if layer_type is None:
        return None
    rows, columns = layer_type.weight(module).shape
    return ModulePart(name, layer_type.name, rows, columns, module.bias is not None)


def _check_stats(stored: QuantizedWeight, seen: Inspection, plan: Plan, stats: Stats | None) -> None:
    """Refuse to scale inputs without statistics, or by those of another model."""
    parent, _, part = stored.name.rpartition(".")
    within = part in ("base", "down") and parent in plan and plan[parent].rank is not None
    reader = parent if within else stored.name
    if stats is None or reader not in stats:
        raise PlanError(
            f"{stored.name}: the plan scales this layer's inputs by their statistics: pass "
            "stats=calibrate(model, data)."
        )
    if layer_type_of(seen.modules[reader]) is not None:
        check_same_weight(seen, reader, stats)
    features = len(stats.inputs[stats.sources[reader]].total)
    if features != stored.columns:
        raise StatsError(
            f"{stored.name}: reads {stored.columns} features, but in the statistics it has {features}. "
            "They are of another model: calibrate this one's dense form."
        )


@torch.no_grad()
def quantized_module(
    model: nn.Module, stored: QuantizedWeight, stats: Stats | None
) -> tuple[QuantizedModule, Tensor | None]:
    """Return the module to put in place of ``model``'s ``stored.name``.

    Returns:
        The module, and what the layer's bias has to take up when it is put there, ``(out,)``; of a ``down``
        that is the bias of its ``up``. ``None`` if nothing.
    """
    scheme, module = scheme_of(stored), model.get_submodule(stored.name)
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding.from_embedding(module, scheme), None
    layer_type = layer_type_named("linear") if isinstance(module, SharedDown) else layer_type_of(module)
    assert layer_type is not None  # checked
    weight = layer_type.weight(module)
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    parent, _, part = stored.name.rpartition(".")
    layer = model.get_submodule(parent)
    factor = part if isinstance(layer, LowRankLinear) else None
    reader = stored.name if factor is None else parent
    if stats is None or reader not in stats:
        return _like(module).from_weight(weight, bias, scheme, layer_type=layer_type.name), None
    inputs = stats.inputs[stats.sources[reader]]
    if factor == "up":
        assert isinstance(layer, LowRankLinear)
        seen = _between(layer, inputs)
        return QuantizedLinear.from_weight(
            weight, bias, scheme, layer_type=layer_type.name, moments=seen
        ), None
    if factor == "down":
        inputs = _of_all(model, layer, stats)
    smooth_scale = input_shift = mean = None
    if stored.smooth_scale:
        smooth_scale, input_shift = _scaling(weight, inputs, stored.input_shift)
    if input_shift is not None and smooth_scale is not None:
        mean = weight.float() @ (input_shift.float() / smooth_scale.float())
        if isinstance(layer, LowRankLinear):
            mean = layer.up.weight.float() @ mean  # of which there is a floating-point one still
    new = _like(module).from_weight(
        weight,
        bias,
        scheme,
        layer_type=layer_type.name,
        smooth_scale=smooth_scale,
        input_shift=input_shift,
        moments=_second(inputs, stored.input_shift, weight.device),
    )
    return new, mean


def _scaling(weight: Tensor, moments: Moments, centred: bool) -> tuple[Tensor, Tensor | None]:
    """Return by what to scale the inputs, and what to take from them then, within the range of float16."""
    smooth_scale = smooth_scale_of(weight, moments.variances(centred))
    if not centred:
        return smooth_scale, None
    input_shift = moments.mean.to(weight.device) * smooth_scale.double()
    return smooth_scale, input_shift.clamp(-6e4, 6e4).to(torch.float16)


def _second(inputs: Moments, centred: bool, device: torch.device) -> Tensor | None:
    """Return the second moment of a layer's input, if more than its diagonal is known."""
    second = inputs.second(centred)
    return second.to(device) if second.ndim == 2 else None


def _between(layer: LowRankLinear, inputs: Moments) -> Tensor | None:
    """Return the second moment ``R C Rᵀ`` of what an ``up`` reads, if that is known."""
    down: nn.Module = layer.down
    centred = isinstance(down, QuantizedLinear) and down.input_shift is not None
    right: Tensor = down.dense_weight() if isinstance(down, QuantizedModule) else down.weight  # type: ignore[assignment]
    second = _second(inputs, centred, right.device)
    return None if second is None else right.double() @ second @ right.double().T


@torch.no_grad()
def rotate(layers: Sequence[LowRankLinear | LowRankEmbedding], seed: int) -> None:
    """Mix the inner dimensions of the factors, so that integers hold them well; the products stay.

    ``layers`` have one ``down``.
    """
    down, ups = layers[0].down.weight, [layer.up.weight for layer in layers]
    right = down.T if isinstance(layers[0], LowRankEmbedding) else down  # (rank, …)
    left, mixed = rotated(torch.cat(ups), right, seed)
    for up, part in zip(ups, torch.split(left, [len(up) for up in ups]), strict=True):
        up.copy_(part)
    right.copy_(mixed)


def readers_of(model: nn.Module, layer: LowRankLinear) -> dict[str, LowRankLinear]:
    """Return the layers that use the ``down`` of ``layer``, with their names, itself among them."""
    every = ((n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear))
    return {name: module for name, module in every if module.down is layer.down}


def _like(module: nn.Module) -> type[QuantizedLinear]:
    return SharedQuantizedDown if isinstance(module, SharedDown) else QuantizedLinear


def _of_all(model: nn.Module, layer: nn.Module, stats: Stats) -> Moments:
    """Return the moments of what all read that use the ``down`` of ``layer``; each input counts once."""
    assert isinstance(layer, LowRankLinear)
    sources = dict.fromkeys(stats.sources[n] for n in readers_of(model, layer) if n in stats)
    moments = [stats.inputs[source] for source in sources]
    return functools.reduce(operator.add, moments)

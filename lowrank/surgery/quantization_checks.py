"""Check, before anything changes, that the quantized weights of a plan fit the model and its statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lowrank.calibration.statistics import Stats
from lowrank.errors import PlanError, StatsError, WeightError
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import described
from lowrank.linalg import Scheme
from lowrank.linalg.svd import checked_weight
from lowrank.nn import (
    QuantizedModule,
    layer_type_of,
)
from lowrank.plans.layer_plan import EMBEDDING, LayerPlan, QuantizedWeight
from lowrank.plans.plan import Plan
from lowrank.plans.stored_tensors import ModulePart, modules_of, scheme_of
from lowrank.surgery.factorization import check_same_weight, weight_of

FACTORS = ("base", "down", "up")
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
    layer = modules.get(stored.name, modules.get(parent) if part in FACTORS else None)
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
    if part in FACTORS and parent in plan and plan[parent].rank is not None:
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
    if name in plan and plan[name].is_narrower:
        rows, columns = plan[name].kept_shape
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
    features, read = len(stats.inputs[stats.sources[reader]].total), stored.columns
    if reader in plan and plan[reader].kept_inputs is not None:  # as many as before, if it is to lose some
        read = weight_of(seen.modules[reader]).shape[1]
    if features != read:
        raise StatsError(
            f"{stored.name}: reads {read} features, but in the statistics it has {features}. "
            "They are of another model: calibrate this one's dense form."
        )

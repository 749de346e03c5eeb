"""Read the entries of a plan from JSON, which may be edited by hand or written by a stranger."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lowrank.config import METRICS
from lowrank.errors import PlanError
from lowrank.files.json_file import check_format
from lowrank.plans.fields import check_fields, quoted
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.reach import UnplannedWeight

PLAN_FORMAT = 2
"""Version of the JSON of a plan, the only one that is read."""

LISTS: dict[str, type] = {"layers": LayerPlan, "quantized": QuantizedWeight, "unplanned": UnplannedWeight}
"""The fields of a plan that are lists, and what of."""


def plan_fields(data: object, cls: type) -> dict[str, Any]:
    """Return the fields of a plan, an object of ``cls``, from what `Plan.to_dict` gave.

    Raises:
        PlanError: If it is no plan, is from another version, or a field has a wrong type.
        RankError: If a rank is not positive.
    """
    if not isinstance(data, dict):
        raise PlanError(f"A plan is a JSON object, not {type(data).__name__}.")
    check_format("The plan", data.get("format"), PLAN_FORMAT, PlanError)
    if not isinstance(data.get("layers"), (list, tuple)):
        raise PlanError('The plan has no list of "layers".')
    for name in LISTS:
        if not isinstance(data.get(name, []), (list, tuple)):
            raise PlanError(f'The plan\'s "{name}" are no list.')
    values = {key: value for key, value in data.items() if key not in ("format", *LISTS)}
    if values.get("metric", "weight") not in METRICS:
        raise PlanError(
            f"The plan has errors under the metric {quoted(values['metric'])}, which is unknown here; "
            f"known are {', '.join(METRICS)}."
        )
    layers = tuple(layer_from_dict(layer) for layer in data["layers"])
    if "model" not in values:
        raise PlanError('The plan does not say which "model" it is for.')
    quantized = tuple(quantized_from_dict(weight) for weight in data.get("quantized", []))
    unplanned = tuple(unplanned_from_dict(weight) for weight in data.get("unplanned", []))
    checked = check_fields(cls, values, "The plan")
    return {**checked, "layers": layers, "quantized": quantized, "unplanned": unplanned}


def layer_from_dict(data: object) -> LayerPlan:
    """Return the entry of a layer; `PlanError` for a field that is missing, unknown or of a wrong type."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise PlanError('The plan has a layer without a "name".')
    values = check_fields(LayerPlan, data, data["name"])
    missing = {"layer_type", "in_features", "out_features", "bias"} - values.keys()
    if missing:
        raise PlanError(f"{data['name']}: the plan lacks {', '.join(sorted(missing))}.")
    whole = values.get("rank") is None  # a layer without elements stays as it is
    if min(values["in_features"], values["out_features"]) < (0 if whole else 1):
        raise PlanError(f"{data['name']}: in_features and out_features must be positive.")
    return LayerPlan(**values)


def quantized_from_dict(data: object) -> QuantizedWeight:
    """Return the entry of a quantized weight; raises `PlanError` as `layer_from_dict` does."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise PlanError('The plan has a quantized weight without a "name".')
    values = check_fields(QuantizedWeight, data, data["name"])
    missing = (
        {field.name for field in fields(QuantizedWeight)}
        - {"group_size", "smooth_scale", "input_shift"}
        - values.keys()
    )
    if missing:
        raise PlanError(f"{data['name']}: the plan lacks {', '.join(sorted(missing))}.")
    if values["rows"] < 1 or values["columns"] < 1:
        raise PlanError(f"{data['name']}: rows and columns must be positive.")
    return QuantizedWeight(**values)


def unplanned_from_dict(data: object) -> UnplannedWeight:
    """Return the entry of a weight that no layer has; raises `PlanError` as `layer_from_dict` does."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise PlanError('The plan has an unplanned weight without a "name".')
    missing = {"shape", "parameters", "reason"} - data.keys()
    if missing:
        raise PlanError(f"{data['name']}: the plan lacks {', '.join(sorted(missing))}.")
    shape, others = data["shape"], {key: value for key, value in data.items() if key != "shape"}
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int for size in shape):
        raise PlanError(f'{data["name"]}: "shape" is {shape!r}, but must be a list of whole numbers.')
    return UnplannedWeight(**check_fields(UnplannedWeight, others, data["name"]), shape=tuple(shape))

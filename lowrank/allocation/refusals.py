"""Say why no layer would change, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lowrank.config import Budget
from lowrank.linalg import ErrorCurve
from lowrank.plans.plan import Plan
from lowrank.plans.reach import shares


def nothing_changes(plan: Plan, budget: Budget, error_curves: Mapping[str, ErrorCurve]) -> str:
    """Say why no layer of ``plan`` has a rank, and what to do."""
    lines = [f"With {budget}, no layer of {plan.model} would change.", *reasons(plan)]
    if not plan.targeted and plan.model_parameters:
        lines += ["Its parameters are:", *shares(plan.model_parameters, 0, plan.unplanned)]
    if not plan.layers:
        advice = "It has no linear layer."
    elif plan.targeted:
        advice = _LESS[budget.name] + _nearest(plan, budget, error_curves)
    elif plan.factorized or plan.quantized:
        advice = "Call decompress(model) first, or start from the dense checkpoint."
    else:
        advice = (
            "Name other layers with targets=[...]; or name with overrule=[...] those whose weight only seems "
            "to be read by value, or which only may compute something else."
        )
    return "\n".join([*lines, f"  {advice}"])


def reasons(plan: Plan) -> list[str]:
    """Return lines that say why layers stay as they are, with an example of each reason."""
    examples: dict[tuple[str, bool], str] = {}
    for layer in plan:
        examples.setdefault((layer.reason, layer.targeted), layer.name)
    return [f"  {name}: {reason}" for (reason, _), name in list(examples.items())[:4]]


def _nearest(plan: Plan, budget: Budget, error_curves: Mapping[str, ErrorCurve]) -> str:
    """Name the first budget at which a layer would change."""
    ranks = {layer.name: layer.break_even_rank // plan.round_to * plan.round_to for layer in plan.targeted}
    if budget.name == "rank":
        largest = max(layer.break_even_rank for layer in plan.targeted)
        return f" The largest that saves parameters is {largest}." if largest else ""
    if budget.name not in ("error", "energy"):
        return ""
    errors = {name: error_curves[name].relative_error(rank) for name, rank in ranks.items() if rank}
    if not errors:
        return ""
    name = min(errors, key=errors.__getitem__)
    error = errors[name] * (1 + plan.tolerance)
    if budget.name == "error":
        return f" From error={math.ceil(1000 * error) / 1000} on, {name} would change."
    return f" From energy={math.floor(1000 * (1 - error**2)) / 1000} down, {name} would change."


_LESS = {
    "rank": "Use a smaller rank.",
    "keep": "Keep less.",
    "energy": "Retain less energy.",
    "error": "Allow a larger error.",
    "max_bytes": "Allow fewer bytes.",
    "speedup": "Ask for more.",
}

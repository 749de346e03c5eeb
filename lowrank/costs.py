"""What a choice of ranks costs in bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from lowrank.planning import LayerPlan, Plan
from lowrank.ranks import Costs, Curve


def byte_costs(model: nn.Module, draft: Plan, max_bytes: int) -> Costs:
    """Count bytes of the whole model's parameters and buffers, tied ones once.

    A bias that a factorized layer gets in addition counts with its factors.
    """
    weights: dict[str, Tensor] = {}
    for layer in draft.targeted:
        module = model.get_submodule(layer.name)
        weights[layer.name] = module.weight  # type: ignore[assignment]
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    targeted = sum(weight.numel() * weight.element_size() for weight in weights.values())

    def price(layer: LayerPlan, curve: Curve) -> Curve:
        each = weights[layer.name].element_size()
        costs = curve.costs * each
        if layer.added_bias:
            added = np.append(np.full(len(curve.ranks), layer.out_features * each), 0)
            costs = costs + added
        return _cheaper_than_dense(replace(curve, costs=costs))

    return Costs(max_bytes, total - targeted, price, lambda cost: f"{cost:,.0f} bytes")


def _cheaper_than_dense(curve: Curve) -> Curve:
    """Drop the choices that cost as much as the dense weight."""
    kept = np.append(curve.costs[:-1] < curve.costs[-1], True)
    return Curve(curve.ranks[kept[:-1]], curve.costs[kept], curve.losses[kept])

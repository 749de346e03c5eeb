"""What a choice of ranks and storage formats costs in bytes."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from lowrank.allocation.candidates import Offer
from lowrank.allocation.costs import Costs
from lowrank.plans.layer_plan import QuantizedWeight
from lowrank.plans.plan import Plan
from lowrank.plans.stored_tensors import layer_bytes, quantized_bytes


def byte_costs(
    model: nn.Module,
    draft: Plan,
    max_bytes: int,
    rest: Iterable[QuantizedWeight] = (),
    calibrated: Container[str] = (),
) -> Costs:
    """Count bytes of the whole model's parameters and buffers, tied ones once.

    A bias that a factorized layer gets in addition counts with its factors.

    Args:
        model: The dense model.
        draft: Its layers; those that are targeted are priced by the candidates, with the copies of their
            weights, which stay where they do.
        max_bytes: The budget.
        rest: What is quantized of everything else.
        calibrated: The layers with statistics.
    """
    weights: dict[str, Tensor] = {}
    for layer in draft.targeted:
        module = model.get_submodule(layer.name)
        weights[layer.name] = module.weight  # type: ignore[assignment]
    tensors = [*model.parameters(), *model.buffers()]
    copies = {
        owner: _bytes(model.get_submodule(x.name).weight for x in users if x.was_copy)  # type: ignore[misc]
        for owner, users in draft.equal.items()
    }
    fixed = _bytes(tensors) - _bytes(weights.values()) - sum(copies.values())
    for stored in rest:
        weight: Tensor = model.get_submodule(stored.name).weight  # type: ignore[assignment]
        fixed += quantized_bytes(stored) - _bytes([weight])

    def price(offer: Offer) -> np.ndarray[Any, Any]:
        width = weights[offer.layers[0].name].element_size()

        def cost(point: int) -> int:
            layers, codes = offer.layers_at(point), offer.quantized_at(point, calibrated)
            own = {layer.name: [c for c in codes if _belongs(c, layer.name)] for layer in layers}
            stored = sum(layer_bytes(layer, own[layer.name], width) for layer in layers)
            return stored + sum(copies.get(x.name, 0) for x in layers if x.rank is None and not own[x.name])

        costs = np.array([0 if rank else cost(point) for point, rank in enumerate(offer.ranks)])
        factors = np.flatnonzero(offer.ranks)
        pivoted = any(offer.formats[point].pivoted for point in factors)
        if pivoted:
            costs[factors] = [cost(int(point)) for point in factors]
        elif len(factors):  # whose bytes grow linearly with the rank
            ends = factors[[0, -1]]
            known = [cost(int(point)) for point in ends]
            costs[factors] = np.interp(offer.ranks[factors], offer.ranks[ends], known)
        return costs

    return Costs(max_bytes, fixed, price, lambda cost: f"{cost:,.0f} bytes")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _belongs(stored: QuantizedWeight, layer: str) -> bool:
    return stored.name == layer or stored.name.rpartition(".")[0] == layer

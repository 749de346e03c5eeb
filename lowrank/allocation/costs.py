"""What a choice of ranks and forms costs in bytes."""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np
from torch import Tensor, nn

from lowrank.allocation.candidates import Candidates, Costs
from lowrank.plans.plan import Plan, QuantizedWeight
from lowrank.plans.storage_formats import quantized_bytes, stored_bytes


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
        draft: Its layers; those that are targeted are priced by the menus, with the copies of their weights,
            which stay where they do.
        max_bytes: The budget.
        rest: What is coded of everything else.
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
    for code in rest:
        weight: Tensor = model.get_submodule(code.name).weight  # type: ignore[assignment]
        fixed += quantized_bytes(code) - _bytes([weight])

    def price(menu: Candidates) -> Candidates:
        width = weights[menu.layers[0].name].element_size()

        def cost(point: int) -> int:
            layers, codes = menu.layers_at(point), menu.quantized_at(point, calibrated)
            own = {layer.name: [c for c in codes if _belongs(c, layer.name)] for layer in layers}
            stored = sum(stored_bytes(layer, own[layer.name], width) for layer in layers)
            return stored + sum(copies.get(x.name, 0) for x in layers if x.rank is None and not own[x.name])

        costs = np.array([0 if rank else cost(point) for point, rank in enumerate(menu.ranks)])
        factors = np.flatnonzero(menu.ranks)
        if len(factors):  # whose bytes grow linearly with the rank
            ends = factors[[0, -1]]
            known = [cost(int(point)) for point in ends]
            costs[factors] = np.interp(menu.ranks[factors], menu.ranks[ends], known)
        return menu.priced(costs)

    return Costs(max_bytes, fixed, price, lambda cost: f"{cost:,.0f} bytes")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _belongs(code: QuantizedWeight, layer: str) -> bool:
    return code.name == layer or code.name.rpartition(".")[0] == layer

"""What a choice of ranks costs in bytes."""

from __future__ import annotations

from torch import Tensor, nn

from lowrank.menus import Costs, Menu
from lowrank.planning import Plan


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

    def price(menu: Menu) -> Menu:
        each = weights[menu.layers[0].name].element_size()
        added = sum(layer.out_features * each for layer in menu.layers if layer.added_bias)
        costs = menu.costs * each
        costs[:-1] += added
        return menu.priced(costs)

    return Costs(max_bytes, total - targeted, price, lambda cost: f"{cost:,.0f} bytes")

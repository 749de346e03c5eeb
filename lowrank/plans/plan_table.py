"""The layers of a plan as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank.plans.formatting import format_table
from lowrank.plans.layer_plan import LayerPlan


def layers_table(layers: Sequence[LayerPlan], schemes: Mapping[str, str]) -> str:
    """Return a line for each layer: its shape, rank, what remains, its error and the reason.

    Args:
        layers: The layers, in their order.
        schemes: By layer, how its weight is stored; with nothing in it there is no such column.
    """
    rows = [
        (
            layer.name,
            f"{layer.out_features}×{layer.in_features}",
            _rank(layer),
            *([schemes.get(layer.tied_to or layer.name, "float")] if schemes else []),
            f"{layer.kept_fraction:.0%}",
            "" if layer.relative_error is None else f"{layer.relative_error:.4f}",
            layer.reason + (f"; down of {layer.shares_down_with}" if layer.shares_down_with else ""),
        )
        for layer in layers
    ]
    stored = ("stored",) if schemes else ()
    return format_table(("layer", "out×in", "rank", *stored, "kept", "error", "reason"), rows)


def _rank(layer: LayerPlan) -> str:
    if layer.is_narrower:
        return "×".join(map(str, layer.kept_shape))
    return "dense" if layer.rank is None else f"{layer.rank}{' pivoted' if layer.pivoted else ''}"

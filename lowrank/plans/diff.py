"""One difference between two plans, in words."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.plans.layer_plan import LayerPlan


@dataclass(frozen=True)
class Change:
    """One difference between two plans; a side without the layer, or without a scheme, is ``None``."""

    name: str
    before: LayerPlan | None
    after: LayerPlan | None
    stored_before: str | None = None
    stored_after: str | None = None

    @property
    def sides(self) -> tuple[str, str]:
        """Both sides in words."""
        before, after = _summary(self.before), _summary(self.after)
        return _with_scheme(before, self.stored_before), _with_scheme(after, self.stored_after)

    def __str__(self) -> str:
        return f"{self.name}: {self.sides[0]} → {self.sides[1]}"


def _with_scheme(summary: str, scheme: str | None) -> str:
    return summary if scheme is None else f"{summary}, {scheme}"


def _summary(layer: LayerPlan | None) -> str:
    if layer is None:
        return "absent"
    if layer.is_narrower:
        return "dense, {}×{}".format(*layer.kept_shape)
    if layer.rank is None:
        return "dense"
    rank = "correction of rank" if layer.correction else "rank"
    shared = layer.shares_down_with or layer.tied_to
    what = "down" if layer.shares_down_with is not None else "weight"
    return f"{rank} {layer.rank}" + (f", {what} of {shared}" if shared is not None else "")

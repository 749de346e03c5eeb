"""Dense layers that have lost neurons know how wide they were: a checkpoint is loaded into the dense model.

They are layers of the model's own types, so that every runtime knows them; the sizes stand beside the others
that such a layer has.
"""

from __future__ import annotations

from torch import Tensor, nn

from lowrank.nn.layer_types import LayerType

_SIZES = "features_before"


def narrower_layer(
    layer_type: LayerType, weight: Tensor, bias: nn.Parameter | None, before: tuple[int, int]
) -> nn.Module:
    """Make a layer around ``weight (out, in)`` that had ``before = (out, in)`` features."""
    layer = layer_type.layer(weight, bias)
    object.__setattr__(layer, _SIZES, before)
    return layer


def features_before(layer: nn.Module) -> tuple[int, int] | None:
    """Return ``(out, in)`` of a layer before it lost neurons; ``None`` if it lost none."""
    return vars(layer).get(_SIZES)


def take_features_before(new: nn.Module, old: nn.Module) -> None:
    """Let ``new``, which takes the place of ``old``, know the features that it had before neurons went."""
    before = features_before(old)
    if before is not None:
        object.__setattr__(new, _SIZES, before)


def forget_features_before(layer: nn.Module) -> None:
    """Make a narrower layer one like any other."""
    vars(layer).pop(_SIZES, None)

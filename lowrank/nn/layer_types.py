"""The dense layers that can be factorized, as a table: how each one stores its weight.

`torch.nn.Linear` stores ``(out, in)``; transformers' ``Conv1D`` stores ``(in, out)``. A new type of
layer is one call of `register_layer_type`. Only exact types count: a subclass may compute something else.
Subclasses of `torch.nn.Linear` that certainly do not are layer types of their own, so that `decompress` gives
them back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.arguments import instance, optional, refused, whole
from lowrank.errors import LowRankError, WeightError
from lowrank.nn.linear_subclasses import build, computes_the_same

FLOATING_DTYPE = instance(torch.dtype, "a torch.dtype, such as torch.float32")
PARAMETER = instance(nn.Parameter, "a torch.nn.Parameter", WeightError)
TENSOR = instance(Tensor, "a tensor", WeightError)


def MATRIX(name: str, value: object) -> Tensor:  # noqa: N802
    """Accept matrices."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise refused(name, value, "a matrix, a tensor of two dimensions", WeightError)
    return value


def check_padding(index: object, rows: int) -> None:
    """Refuse a padding row that a table of ``rows`` does not have; negative ones count from its end."""
    optional(whole(-rows, rows - 1))("padding_idx", index)


@dataclass(frozen=True)
class LayerType:
    """How one type of layer stores ``y = Wx + b``.

    Args:
        name: The word in plans and checkpoints.
        module: The exact type.
        transposed: Whether ``module.weight`` is ``(in, out)``.
        build: Makes an uninitialised layer on the meta device from ``(in, out, bias)``.
        certain: Whether its layers compute ``Wx + b`` for sure; if not, they stay as they are unless a user
            overrules that.
    """

    name: str
    module: type[nn.Module]
    transposed: bool
    build: Callable[[int, int, bool], nn.Module]
    certain: bool = True

    def weight(self, layer: nn.Module) -> Tensor:
        """Return a view of the weight as ``(out, in)``."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def layer(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        """Make a layer around ``weight (out, in)`` and ``bias (out,)``; nothing is initialised."""
        layer = self.build(weight.shape[1], weight.shape[0], bias is not None)
        stored = weight.T.contiguous() if self.transposed else weight
        layer.weight = nn.Parameter(stored)
        layer.bias = bias  # type: ignore[assignment]  # also where the class has a plain None there
        return layer


_LAYER_TYPES: dict[type[nn.Module], LayerType] = {}

_CONV1D = "transformers.pytorch_utils.Conv1D"
"""Known by name, and registered when first seen: nothing here imports transformers."""


def register_layer_type(layer_type: LayerType) -> None:
    """Make layers of type ``layer_type.module`` factorizable."""
    _LAYER_TYPES[layer_type.module] = layer_type


def layer_type_of(module: nn.Module) -> LayerType | None:
    """Return how ``module`` stores its weight; ``None`` if it is of no type of linear layer."""
    cls = type(module)
    if cls not in _LAYER_TYPES and _place_of(cls) == _CONV1D:
        register_layer_type(_conv1d(cls))
    elif cls not in _LAYER_TYPES and issubclass(cls, nn.Linear):
        layer_type = _subclass(cls)
        if not layer_type.certain:  # not registered: parametrizing makes a new class for each layer
            return layer_type
        register_layer_type(layer_type)
    return _LAYER_TYPES.get(cls)


def layer_type_named(name: str) -> LayerType:
    """Return the layer type called ``name``.

    Raises:
        LowRankError: If no such layer type is registered.
    """
    layer_type = find_layer_type(name)
    if layer_type is None:
        raise LowRankError(
            f'No type of dense layer is called "{name}" here. Call lowrank.nn.register_layer_type first.'
        )
    return layer_type


def find_layer_type(name: str) -> LayerType | None:
    """Return the layer type called ``name`` if it is registered; the last of several with one name."""
    return next(
        (layer_type for layer_type in reversed(_LAYER_TYPES.values()) if layer_type.name == name), None
    )


register_layer_type(
    LayerType(
        name="linear",
        module=nn.Linear,
        transposed=False,
        build=lambda in_features, out_features, bias: nn.Linear(
            in_features, out_features, bias=bias, device="meta"
        ),
    )
)


def _conv1d(cls: type[nn.Module]) -> LayerType:
    def build(in_features: int, out_features: int, bias: bool) -> nn.Module:
        with torch.device("meta"):
            return cls(out_features, in_features)

    return LayerType(name="conv1d", module=cls, transposed=True, build=build)


def _place_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _subclass(cls: type[nn.Module]) -> LayerType:
    """Describe a subclass of `torch.nn.Linear`, by its short name unless another class has that."""
    others = {
        layer_type.name
        for layer_type in _LAYER_TYPES.values()
        if _place_of(layer_type.module) != _place_of(cls)
    }
    name = _place_of(cls) if cls.__name__ in others | {"embedding"} else cls.__name__
    return LayerType(
        name=name,
        module=cls,
        transposed=False,
        build=functools.partial(build, cls, device="meta"),
        certain=computes_the_same(cls),  # type: ignore[arg-type]
    )

"""What a planned layer consists of: the one list of its modules and tensors, with shapes, dtypes and bytes.

Checkpoints, their checks, byte budgets, empty skeletons and the plug-in read it. A new way to store a weight
is an entry in `lowrank.linalg.schemes`; what it stores is listed from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from lowrank.linalg import Scheme
from lowrank.plans.layer_plan import EMBEDDING, LayerPlan, QuantizedWeight
from lowrank.plans.plan import Plan

INPUT_DTYPE = torch.float16
"""The dtype of the scale by which a quantized layer multiplies its inputs,
and of the shift that it subtracts."""


ORDER_DTYPE = torch.int32
"""The dtype of the order of the outputs of pivoted factors."""


class ModulePart(NamedTuple):
    """A module with a weight of its own, as it will be once a layer is factorized.

    Args:
        name: Its full name.
        layer_type: ``"linear"``, ``"embedding"``, or the layer's own type where it stays whole.
        rows, columns: Shape of the weight.
        bias: Whether it has a bias.
    """

    name: str
    layer_type: str
    rows: int
    columns: int
    bias: bool

    @property
    def is_embedding(self) -> bool:
        """Whether the weight is looked up by rows."""
        return self.layer_type == EMBEDDING


class TensorPart(NamedTuple):
    """A tensor of a checkpoint.

    Args:
        shape: Its shape.
        dtype: The dtype that it must have; ``None`` for the floating dtype of the model.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def modules_of(layer: LayerPlan) -> dict[str, ModulePart]:
    """Return the modules that hold the weights of ``layer``, by their name within it; ``""`` is the layer.

    A layer that uses the weight of another has none; one that shares its ``down`` has that with its owner.
    """
    rows, columns, rank = layer.out_features, layer.in_features, layer.rank
    if layer.tied_to is not None:
        return {}
    if rank is None:
        return {"": ModulePart(layer.name, layer.layer_type, *layer.kept_shape, layer.bias)}
    if layer.is_embedding:
        sizes = {
            "down": (EMBEDDING, rows, rank, False),
            "up": ("linear", columns, rank, layer.has_bias),
        }
    else:
        sizes = {
            "base": ("linear", rows, columns, False),
            "down": ("linear", rank, columns, False),
            "up": ("linear", rows, rank, layer.has_bias),
        }
        if layer.pivoted:
            sizes["up.rest"] = ("linear", rows - rank, rank, False)
            del sizes["up"]
        absent = {"base": not layer.correction, "down": layer.shares_down_with is not None, "up": False}
        sizes = {part: size for part, size in sizes.items() if not absent.get(part)}
    return {part: ModulePart(f"{layer.name}.{part}", *size) for part, size in sizes.items()}


def scheme_of(weight: QuantizedWeight) -> Scheme:
    """Return the scheme that ``weight`` names; `SchemeError` if there is none, or it does not divide."""
    scheme = Scheme(weight.scheme, weight.group_size)
    scheme.check(weight.rows, weight.columns)
    return scheme


def quantized_tensors(weight: QuantizedWeight) -> dict[str, TensorPart]:
    """Return what is stored of a quantized weight, by the name within its module; its bias left out."""
    stored = scheme_of(weight).tensors(weight.rows, weight.columns)
    found = {name: TensorPart(shape, dtype) for name, (shape, dtype) in stored.items()}
    for name in ("smooth_scale", "input_shift"):
        if getattr(weight, name):
            found[name] = TensorPart((weight.columns,), INPUT_DTYPE)
    return found


def tensors_of(plan: Plan) -> dict[str, TensorPart]:
    """Return the tensors of all compressed layers of ``plan`` by their names in a checkpoint, biases left
    out.

    A ``weight`` without elements stands where the dense one was; its own dtype says what the layer computes
    in.

    Raises:
        SchemeError: If a quantized weight has an unknown scheme.
    """
    found: dict[str, TensorPart] = {}
    for layer in plan.factorized:
        found[f"{layer.name}.weight"] = TensorPart(_marker(layer.is_embedding, layer.in_features))
        for part in modules_of(layer).values():
            found[f"{part.name}.weight"] = TensorPart((part.rows, part.columns))
        if layer.pivoted:
            found[f"{layer.name}.up.order"] = TensorPart((layer.out_features,), ORDER_DTYPE)
    for layer in plan.tied:
        found[f"{layer.name}.weight"] = TensorPart((layer.out_features, 0))
    for weight in plan.quantized:
        found[f"{weight.name}.weight"] = TensorPart(_marker(weight.is_embedding, weight.columns))
        found |= {f"{weight.name}.{name}": part for name, part in quantized_tensors(weight).items()}
    return found


def _marker(is_embedding: bool, columns: int) -> tuple[int, ...]:
    return (0, columns) if is_embedding else (0,)


def quantized_bytes(weight: QuantizedWeight) -> int:
    """Return the bytes of a quantized weight: integers, scales, and what is done to inputs."""
    return sum(math.prod(part.shape) * _itemsize(part) for part in quantized_tensors(weight).values())


def _itemsize(part: TensorPart) -> int:
    assert part.dtype is not None  # of what is quantized
    return part.dtype.itemsize


def layer_bytes(layer: LayerPlan, quantized: Iterable[QuantizedWeight], width: int) -> int:
    """Return the bytes of a layer's weight or factors, of which some are ``quantized``.

    The bias that the dense layer has is left out; one that it gets counts.

    Args:
        layer: Its entry, with the rank that it will have.
        quantized: As `StorageFormat.quantized` gave them.
        width: Bytes of an element in floating point.
    """
    stored = {weight.name: weight for weight in quantized}
    added = width * layer.bias_features if layer.added_bias and layer.rank is not None else 0
    if layer.pivoted:
        added += ORDER_DTYPE.itemsize * layer.out_features
    modules = modules_of(layer).values()
    return added + sum(_module_bytes(part, stored.get(part.name), width) for part in modules)


def _module_bytes(part: ModulePart, weight: QuantizedWeight | None, width: int) -> int:
    return part.rows * part.columns * width if weight is None else quantized_bytes(weight)

"""A model's state dict as a checkpoint holds it: tensors only, each once, none overlapping another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError
from lowrank.files.integrity import check_finite
from lowrank.files.safetensors_header import DTYPE_NAMES


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that a checkpoint of ``model`` holds, and the names that share one of them.

    Raises:
        CheckpointError: If the state dict holds something that is no tensor, or has no data.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_of(model).items():
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name}: {tensor.dtype} cannot be stored in a safetensors file.")
        if tensor.is_meta:
            raise CheckpointError(f"{name}: on the meta device, without data. Load the weights first.")
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in owner:
            aliases[name] = owner[key]
        else:
            owner[key] = name
            tensors[name] = tensor
    return tensors, aliases


def check_disjoint(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of which two share elements, such as a transposed view beside its original.

    A file would hold the elements twice, and what is loaded would no longer share them. Tensors that are the
    same in all respects are one in `stored_tensors`, and tied again when they are loaded.

    Raises:
        CheckpointError: If there are such tensors.
    """
    by_place = sorted(
        ((t.device.type, t.device.index or 0, t.data_ptr(), name) for name, t in tensors.items() if t.numel())
    )
    for position, (*device, _, name) in enumerate(by_place):
        first = tensors[name]
        end = first.data_ptr() + _extent(first) * first.element_size()
        for *other_device, start, other in by_place[position + 1 :]:
            if other_device != device or start >= end:
                break
            if _share_elements(first, tensors[other]):
                raise CheckpointError(
                    f"{name} and {other} share memory, but are not the same tensor, so loading would untie "
                    "them. Give one of them memory of its own (nn.Parameter(weight.detach().clone())), or "
                    "register one parameter under both names."
                )


def _extent(tensor: Tensor) -> int:
    """Return how many elements lie between the first and the last of ``tensor``, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share_elements(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors, of which ``second`` begins within the extent of ``first``, overlap.

    Interleaved views, such as halves of the columns of one matrix, do not.
    """
    skipped, rest = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    if rest or first.element_size() != second.element_size():
        return True  # the same bytes, read as numbers of two kinds
    used = torch.zeros(max(_extent(first), skipped + _extent(second)), dtype=torch.bool)
    used.as_strided(first.shape, first.stride()).fill_(True)
    return bool(used.as_strided(second.shape, second.stride(), skipped).any())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, which must hold tensors only."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: the model's state is a {type(value).__name__}, not a tensor, and nothing is "
                "ever pickled. Keep it in a buffer, or save it yourself."
            )
    return state


ALIGNMENT = 64
"""Bytes. Kernels sum in another order, and round otherwise, where a tensor does not begin at a multiple."""


def align(tensors: Iterable[Tensor]) -> None:
    """Move the data of those tensors on the CPU that do not begin at a multiple of `ALIGNMENT` bytes."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def check_finite_state(
    model: nn.Module, where: str | Path | None = None, advice: str = "Is it trained?"
) -> None:
    """Refuse a model in which a stored number is NaN, or a parameter infinite.

    Args:
        model: A model; tensors without data are left out.
        where: The file or folder for the message; the model's class if there is none.
        advice: What to do, as the end of the message.

    Raises:
        CheckpointError: If there is such a number.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            place = type(model).__name__ if where is None else where
            check_finite(place, name, value, buffer=name not in parameters, advice=advice)

"""The schemes by which weights become integers, as a table: what each stores, and how it rounds.

A new scheme is one subclass of `StorageScheme` and one call of `register_storage_scheme`. Files, prices,
checks, reports and layers read the rest from there; layers without a kernel for it multiply by the
dequantized weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank.arguments import is_whole
from lowrank.errors import SchemeError

GROUP_SIZE = 32
"""Elements of a row that share a scale, unless another number is given: 4.5 bits per weight under int4, as in
GGUF's Q4_0."""

LARGEST_GROUP = 2**24
"""The most elements of a group.
Ranks are multiples of a group, and such numbers stay within what arrays are indexed by."""


class StorageScheme:
    """How one scheme stores and rounds a weight ``(rows, columns)``: ``W ≈ scale · integers``.

    Attributes:
        name: The word in requests, plans and checkpoints.
        grouped: Whether a row is divided into groups, each with a scale; if not, it has one scale.
        rounds_inputs: Whether layers round what they read, too, and multiply integers by integers.
        kernel: The kernel of `lowrank.nn.integer_matmul` that multiplies by it, or ``None``.
        per_element: Integers in one element of the stored codes.
        codes_dtype, scale_dtype: How both are stored.
        smallest, largest: Between these the largest element of a weight must be, for the scales to hold it.
    """

    name: ClassVar[str]
    grouped: ClassVar[bool] = False
    rounds_inputs: ClassVar[bool] = False
    kernel: ClassVar[str | None] = None
    per_element: ClassVar[int] = 1
    codes_dtype: ClassVar[torch.dtype] = torch.int8
    scale_dtype: ClassVar[torch.dtype] = torch.float32
    smallest: ClassVar[float] = 0.0
    largest: ClassVar[float] = math.inf

    def quantize(
        self, weight: Tensor, group_size: int | None, feedback: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return codes and scales of a float32 ``weight``, as they are stored.

        ``feedback`` is the triangular factor by which later columns make up for an error in earlier ones
        (`lowrank.linalg.quantization`), or ``None``.
        """
        raise NotImplementedError

    def requantize(self, weight: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
        """Return the codes nearest to ``weight`` for given scales, as they are stored."""
        raise NotImplementedError

    def integers(self, codes: Tensor) -> Tensor:
        """Return stored codes as one element to a number, ``(…, columns)``."""
        return codes

    def are_possible_codes(self, codes: Tensor) -> bool:
        """Tell whether `quantize` can have given such codes."""
        return True

    def are_possible_scales(self, scale: Tensor) -> bool:
        """Tell whether `quantize` can have given such scales."""
        return bool(scale.isfinite().all())


_SCHEMES: dict[str, StorageScheme] = {}


def register_storage_scheme(scheme: StorageScheme) -> None:
    """Let ``quantize=`` and checkpoints name ``scheme``; call it before loading a checkpoint that has it."""
    _SCHEMES[scheme.name] = scheme


@dataclass(frozen=True)
class Scheme:
    """A scheme and its group size, as a request or a plan names them.

    Args:
        name: ``"int8"``, ``"int4"``, or another that is registered.
        group_size: Elements that share a scale; ``None`` for a whole row, or for the default of 32.

    Raises:
        SchemeError: If there is no such scheme, or it has no such groups.
    """

    name: str
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _SCHEMES:
            known = " and ".join(map(repr, _SCHEMES))
            raise SchemeError(f"quantize={self.name!r}: known schemes are {known}.")
        if not self.storage.grouped:
            if self.group_size is not None:
                raise SchemeError(f"{self.name} has one scale per row: leave out group_size, or use int4.")
            return
        size = GROUP_SIZE if self.group_size is None else self.group_size
        if not is_whole(size) or size < 2 or size % 2:
            raise SchemeError(f"group_size={size!r}: give an even number of elements, such as 32.")
        if size > LARGEST_GROUP:
            raise SchemeError(f"group_size={size!r}: no row has so many elements. Give 32, for instance.")
        object.__setattr__(self, "group_size", int(size))

    @property
    def storage(self) -> StorageScheme:
        """How the scheme stores and rounds."""
        return _SCHEMES[self.name]

    def check(self, rows: int, columns: int) -> None:
        """Raise `SchemeError` if a weight ``(rows, columns)`` cannot be divided into groups."""
        if self.group_size is not None and columns % self.group_size:
            raise SchemeError(
                f"rows of {columns} elements are not whole groups of {self.group_size}. Use a group_size "
                f"that divides {columns}, ranks that are its multiples (round_to={self.group_size}), or int8."
            )

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Return shape and dtype of what is stored of a weight ``(rows, columns)``, by name."""
        groups = 1 if self.group_size is None else columns // self.group_size
        storage = self.storage
        return {
            "codes": ((rows, columns // storage.per_element), storage.codes_dtype),
            "scale": ((rows, groups), storage.scale_dtype),
        }

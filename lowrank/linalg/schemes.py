"""The schemes by which weights become integers, as a table: what each stores, and how it rounds.

A new scheme is one subclass of `StorageScheme` and one call of `register_storage_scheme`. Files, prices,
checks, reports and layers read the rest from there; layers without a kernel for it multiply by the
dequantized weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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

    name: str
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

    @property
    def columns(self) -> int | None:
        """The only number of columns that a weight can have; ``None`` for any."""
        return None

    def codes_per_row(self, columns: int) -> int:
        """Return how many elements the codes of a row of ``columns`` have."""
        return columns // self.per_element

    def scales_per_row(self, columns: int, group_size: int | None) -> int:
        """Return how many scales a row of ``columns`` has."""
        return 1 if group_size is None else columns // group_size

    def integers(self, codes: Tensor) -> Tensor:
        """Return stored codes as one element to a number, ``(…, columns)``."""
        return codes

    def scales(self, scale: Tensor) -> Tensor:
        """Return stored scales as numbers."""
        return scale

    def are_possible_codes(self, codes: Tensor) -> bool:
        """Tell whether `quantize` can have given such codes."""
        return True

    def are_possible_scales(self, scale: Tensor) -> bool:
        """Tell whether `quantize` can have given such scales."""
        return bool(scale.isfinite().all())


STORAGE_SCHEMES: dict[str, StorageScheme] = {}
_FAMILIES: list[Callable[[str], StorageScheme | None]] = []


def register_storage_scheme(scheme: StorageScheme) -> None:
    """Let ``quantize=`` and checkpoints name ``scheme``; call it before loading a checkpoint that has it."""
    STORAGE_SCHEMES[scheme.name] = scheme


def register_scheme_family(named: Callable[[str], StorageScheme | None]) -> None:
    """Let plans name schemes with parameters in the name; ``named`` returns ``None`` for other names."""
    _FAMILIES.append(named)


@functools.lru_cache
def _of_a_family(name: str) -> StorageScheme | None:
    return next((scheme for named in _FAMILIES if (scheme := named(name)) is not None), None)


def _known(name: str) -> StorageScheme | None:
    return STORAGE_SCHEMES.get(name) or _of_a_family(name)


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
        if not isinstance(self.name, str) or _known(self.name) is None:
            known = " and ".join(map(repr, STORAGE_SCHEMES))
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
        found = _known(self.name)
        assert found is not None  # checked
        return found

    def check(self, rows: int, columns: int) -> None:
        """Raise `SchemeError` if a weight ``(rows, columns)`` cannot be divided into groups."""
        if self.storage.columns not in (None, columns):
            raise SchemeError(f"{self.name} is for rows of {self.storage.columns} elements, not {columns}.")
        if self.group_size is not None and columns % self.group_size:
            raise SchemeError(
                f"rows of {columns} elements are not whole groups of {self.group_size}. Use a group_size "
                f"that divides {columns}, ranks that are its multiples (round_to={self.group_size}), or int8."
            )

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Return shape and dtype of what is stored of a weight ``(rows, columns)``, by name."""
        storage = self.storage
        return {
            "codes": ((rows, storage.codes_per_row(columns)), storage.codes_dtype),
            "scale": ((rows, storage.scales_per_row(columns, self.group_size)), storage.scale_dtype),
        }

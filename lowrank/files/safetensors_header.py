"""The safetensors format: what a model puts into a file, what that will weigh, and what its header says."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.files.json_file import check_regular, parse_json

METADATA = {"format": "pt"}
"""What transformers writes into the header, and expects there."""


DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = list(DTYPE_NAMES)
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LARGEST = 2**63 - 1
_FLOATS = {name for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}


class Stored(NamedTuple):
    """What a header says about one tensor."""

    dtype: str  # a name of the format, such as "F32"
    shape: tuple[int, ...]
    start: int  # the tensor's first byte in the file

    @property
    def is_floating_point(self) -> bool:
        """Whether the tensor can stand for weights."""
        return self.dtype in _FLOATS


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Predict the exact size of a safetensors file in bytes, with its header.

    Source: the safetensors format: 8 bytes, JSON padded to 8 bytes, then the tensors, sorted by
    falling dtype and rising name.
    """
    order = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for name in order:
        tensor = tensors[name]
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def read_header(file: str | Path) -> dict[str, Stored]:
    """Check that ``file`` is a whole safetensors file, and return its tensors' dtypes and shapes.

    Raises:
        CheckpointError: If it is truncated, has bytes to spare, or is something else.
    """
    try:
        check_regular(file)
        size = Path(file).stat().st_size
        with Path(file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError(f"its header claims {length:,} bytes")
            header = parse_json(stream.read(length).decode())
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        places = {name: _place(name, entry) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{file}: not a safetensors file, or damaged: {error}.") from error
    end = 0
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start != end:
            raise CheckpointError(f"{file}: damaged: the tensor {name} begins at {start:,}, not at {end:,}.")
        end = stop
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file}: damaged: its tensors need {8 + length + end:,} bytes, the file has {size:,}. "
            "Copy it again."
        )
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + places[name][0])
        for name, entry in header.items()
    }


def read_stored(stream: BinaryIO, stored: Stored) -> Tensor:
    """Read one tensor into memory of its own, on the CPU: no part of the file is mapped.

    Raises:
        OSError: If the file ends before the tensor does.
    """
    tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype], device="cpu")  # whatever the default is
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    stream.seek(stored.start)
    if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise OSError("it has become shorter while it was read")
    return tensor


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Return where a tensor's data begin and end, if its entry in a header makes sense.

    Raises:
        ValueError: If it does not.
    """
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"the tensor {name} has the dtype {str(dtype)[:20]!r}, which is unknown here")
    if not _are_sizes(shape) or math.prod(max(1, size) for size in shape) > _LARGEST:
        raise ValueError(f"the tensor {name} has no shape that a tensor can have")
    if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
        raise ValueError(f"the tensor {name} has no place in the file")
    if place[1] - place[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"the tensor {name} has {place[1] - place[0]:,} bytes, not those of its shape")
    return place[0], place[1]


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

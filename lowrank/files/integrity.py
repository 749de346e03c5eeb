"""Whether a checkpoint is what was saved: digests of tensors and of JSON, and numbers that no model has.

Digests protect against damage, not against forgery: they lie beside what they are of.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.files.json_file import check_format, read_json
from lowrank.files.safetensors_header import DTYPE_NAMES, Stored, read_header, read_stored

SEAL = "digest"
"""The field of a JSON object that holds the digest of all its other fields."""


def digest_of(tensor: Tensor) -> str:
    """Hash dtype, shape and bytes: the same bytes read as another dtype are another tensor."""
    state = hashlib.sha256(f"{DTYPE_NAMES.get(tensor.dtype)} {tuple(tensor.shape)} ".encode())
    state.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return state.hexdigest()


def check_dtype(file: str | Path, name: str, stored: Stored, expected: torch.dtype, exact: bool) -> None:
    """Refuse a tensor of another kind: integers for floating-point numbers, or the other way round.

    Args:
        file: Where ``stored`` is.
        name: Its name there.
        stored: Its dtype and shape.
        expected: The dtype that the model, or the plan, has for it.
        exact: Whether it must have that dtype, as codes, scales and orders must.

    Raises:
        CheckpointError: If it has another.
    """
    wanted = DTYPE_NAMES[expected]
    if stored.dtype == wanted or (not exact and stored.is_floating_point == expected.is_floating_point):
        return
    kind = "floating-point numbers" if expected.is_floating_point else "integers"
    raise CheckpointError(
        f"{file}: the tensor {name} is stored as {stored.dtype}, but must be {wanted if exact else kind}. "
        "The file has been changed; copy it again."
    )


def read_document(file: str | Path, current: int) -> dict[str, Any]:
    """Return the JSON object in ``file``, whose format is ``current``.

    Raises:
        CheckpointError: If it cannot be read, says no format, or is from another version.
    """
    document = read_json(file)
    check_format(file, document.get("format"), current)
    if "tensors" in document:
        check_is_text_table(file, document["tensors"], "tensors")
    return document


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``document`` with a digest of its fields, so that a change to any of them is found."""
    return {**document, SEAL: _digest_of_fields(document)}


def check_seal(file: str | Path, document: Mapping[str, Any], advice: str = "Copy it again.") -> None:
    """Refuse a ``document`` from ``file`` that is not as `sealed` returned it.

    Raises:
        CheckpointError: If a field was changed, added or removed; the message ends with ``advice``.
    """
    if document.get(SEAL) != _digest_of_fields(document):
        raise CheckpointError(f"{file}: is not as it was saved: a field has been changed. {advice}")


def _digest_of_fields(document: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in document.items() if name != SEAL}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_is_text_table(file: str | Path, table: Any, field: str) -> None:
    """Refuse a ``field`` of ``file`` that is no mapping of names to strings."""
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise CheckpointError(f'{file}: "{field}" must map names to strings.')


def read_tensors(
    file: str | Path, header: Mapping[str, Stored], digests: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor for all in ``file``, one by one, in memory of their own, aligned, on the CPU.

    Args:
        file: A safetensors file.
        header: What `lowrank.files.safetensors_header.read_header` returned for it.
        digests: By name, as `digest_of` gave them; ``None`` if there are none to compare with.

    Raises:
        CheckpointError: If the file cannot be read, or a tensor is not the one that was saved.
    """
    names = sorted(header)
    strange = next((name for name in names if digests is not None and name not in digests), None)
    if strange is not None:
        raise CheckpointError(f"{file}: has the tensor {strange}, without a digest. Copy it again.")
    try:
        with Path(file).open("rb") as stream:
            for name in names:
                tensor = read_stored(stream, header[name])
                if digests is not None and digests[name] != digest_of(tensor):
                    raise CheckpointError(
                        f"{file}: the tensor {name} is not the one that was saved. Copy it again."
                    )
                yield name, tensor
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error


def load_tensors(file: str | Path, digests: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Return all tensors in ``file`` by name, after the checks of `read_header` and `read_tensors`."""
    return dict(read_tensors(file, read_header(file), digests))


def check_finite(
    where: str | Path, name: str, tensor: Tensor, *, buffer: bool = False, advice: str = "Copy it again."
) -> None:
    """Refuse NaN, and in a parameter infinity as well; the masks in buffers may be infinite.

    Raises:
        CheckpointError: If ``tensor`` has such an element; the message ends with ``advice``.
    """
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return
    values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no such functions
    extremes = [float(value) for value in values.detach().aminmax()]  # one pass; NaN goes through
    if any(map(math.isnan, extremes)) or not (buffer or all(map(math.isfinite, extremes))):
        what = "NaN" if buffer else "NaN or infinite"
        raise CheckpointError(f"{where}: the tensor {name} has {what} elements in {tensor.dtype}. {advice}")

"""Where a training run stands, as a folder: safetensors for the tensors, JSON for the numbers.

A run that was interrupted goes on from its last snapshot. A snapshot is written as one step, so that an
interrupt while writing leaves the one before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank.arguments import number, whole
from lowrank.errors import CheckpointError
from lowrank.files.folders import settle, staged
from lowrank.files.integrity import check_seal, digest_of, load_tensors, read_document, sealed
from lowrank.files.safetensors_header import METADATA

SNAPSHOT_FORMAT = 4
"""Version of the folder, the only one that is read."""

_TENSORS, _STRUCTURE = "snapshot.safetensors", "snapshot.json"


@dataclass(frozen=True)
class Snapshot:
    """The state of a run.

    Args:
        steps: Batches trained on.
        progress: The fraction of the run that was over, in [0, 1].
        best: The smallest distance on held-out batches so far.
        parameters: As they are now.
        kept: As they were at the smallest distance.
        moments: The optimizer's running means of the gradients, and of their squares; nothing where the
            run goes block by block, since each block begins anew.
        blocks: How many blocks are done, where it goes block by block.
        evaluations: How many looks at held-out batches are done, of those that a run has on its way; 0
            where it goes block by block.
    """

    steps: int
    progress: float
    best: float
    parameters: Sequence[Tensor]
    kept: Sequence[Tensor]
    moments: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())
    blocks: int | None = None
    evaluations: int = 0

    def save(self, folder: Path) -> None:
        """Write the snapshot in place of the one before.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        groups = (self.parameters, self.kept, *self.moments)
        tensors = {
            f"{name}.{number}": tensor.detach().contiguous().clone()
            for name, group in zip(_GROUPS, groups, strict=True)
            for number, tensor in enumerate(group)
        }
        numbers = {
            "format": SNAPSHOT_FORMAT,
            "steps": self.steps,
            "progress": self.progress,
            "evaluations": self.evaluations,
            "best": self.best,
            "tensors": {name: digest_of(tensor) for name, tensor in tensors.items()},
        }
        if self.blocks is not None:
            numbers["blocks"] = self.blocks
        with staged(folder, overwrite=True) as staging:
            save_file(tensors, staging / _TENSORS, METADATA)
            text = json.dumps(sealed(numbers), allow_nan=False)
            (staging / _STRUCTURE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, parameters: Sequence[Tensor], blockwise: bool = False) -> Snapshot | None:
        """Read the snapshot in ``folder``; ``None`` if there is none.

        Args:
            folder: Where `save` wrote.
            parameters: Those of the run: the snapshot must have their shapes and dtypes.
            blockwise: Whether the run goes block by block.

        Raises:
            CheckpointError: If the snapshot is damaged, from a newer version, of another model, or of a
                run of the other kind.
        """
        settle(folder)
        file = folder / _STRUCTURE
        if not file.exists():
            return None
        numbers = read_document(file, SNAPSHOT_FORMAT)
        check_seal(file, numbers)
        if ("blocks" in numbers) != blockwise:
            kind = "as a whole" if blockwise else "block by block"
            raise CheckpointError(f"{folder}: a snapshot of a run {kind}. Give an empty folder.")
        steps, progress, best, evaluations = (
            _NUMBERS[key](f"{file}: {key}", numbers.get(key)) for key in _STATE
        )
        blocks = _NUMBERS["steps"](f"{file}: blocks", numbers["blocks"]) if blockwise else None
        tensors = load_tensors(folder / _TENSORS, numbers.get("tensors"))
        groups = [
            [_fitting(folder, f"{name}.{number}", mine, tensors) for number, mine in enumerate(parameters)]
            for name in (_GROUPS[:2] if blockwise else _GROUPS)
        ]
        moments = ((), ()) if blockwise else (groups[2], groups[3])
        return cls(steps, progress, best, groups[0], groups[1], moments, blocks, evaluations)


_GROUPS = ("parameters", "kept", "means", "squares")


_STATE = ("steps", "progress", "best", "evaluations")
_NUMBERS = {
    "steps": whole(error=CheckpointError),
    "progress": number(0, error=CheckpointError),
    "evaluations": whole(error=CheckpointError),
    "best": number(error=CheckpointError),
}


def _fitting(folder: Path, name: str, mine: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor ``name`` of a snapshot, on the device of the parameter whose state it is."""
    found = tensors.get(name)
    if found is None:
        raise CheckpointError(
            f"{folder}: the snapshot lacks the tensor {name}. It is damaged, or of another model: give an "
            "empty folder to begin anew."
        )
    if mine.shape != found.shape or mine.dtype != found.dtype or not bool(torch.isfinite(found).all()):
        raise CheckpointError(
            f"{folder}: the snapshot's tensor {name} is {tuple(found.shape)} of {found.dtype} where this "
            f"model has {tuple(mine.shape)} of {mine.dtype}, or is not finite. Give an empty folder to begin "
            "anew."
        )
    return found.to(mine.device)

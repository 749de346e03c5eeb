"""Where a training run stands, as a folder: safetensors for the tensors, JSON for the numbers.

A run that was interrupted goes on from its last snapshot. A snapshot is written as one step, so that an
interrupt while writing leaves the one before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.folders import settle, staged
from lowrank.tensorfile import METADATA, read_header

SNAPSHOT_FORMAT = 1
"""Version of the folder; a reader refuses anything newer."""

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
    """

    steps: int
    progress: float
    best: float
    parameters: Sequence[Tensor]
    kept: Sequence[Tensor]
    moments: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())
    blocks: int | None = None

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
            "best": self.best,
        }
        if self.blocks is not None:
            numbers["blocks"] = self.blocks
        with staged(folder, overwrite=True) as staging:
            save_file(tensors, staging / _TENSORS, METADATA)
            (staging / _STRUCTURE).write_text(json.dumps(numbers, allow_nan=False), encoding="utf-8")

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
        if not (folder / _STRUCTURE).exists():
            return None
        file = folder / _TENSORS
        try:
            numbers = json.loads((folder / _STRUCTURE).read_text(encoding="utf-8"))
            if numbers["format"] > SNAPSHOT_FORMAT:
                raise CheckpointError(f"{folder}: a snapshot of a newer version. Install a newer lowrank.")
            blocks = numbers.get("blocks")
            if (blocks is not None) != blockwise:
                kind = "as a whole" if blockwise else "block by block"
                raise CheckpointError(f"{folder}: a snapshot of a run {kind}. Give an empty folder.")
            names = _GROUPS[:2] if blockwise else _GROUPS
            read_header(file)
            with safe_open(file, framework="pt") as tensors:
                groups = [
                    [tensors.get_tensor(f"{name}.{number}") for number in range(len(parameters))]
                    for name in names
                ]
            for group in groups:
                for mine, found in zip(parameters, group, strict=True):
                    _check(folder, mine, found)
            placed = [[t.to(p.device) for t, p in zip(g, parameters, strict=True)] for g in groups]
            state = int(numbers["steps"]), float(numbers["progress"]), float(numbers["best"])
            if blockwise:
                return cls(*state, placed[0], placed[1], blocks=int(blocks))
            return cls(*state, placed[0], placed[1], (placed[2], placed[3]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: the snapshot is damaged, or of another model: {error}."
            ) from error


_GROUPS = ("parameters", "kept", "means", "squares")


def _check(folder: Path, mine: Tensor, found: Tensor) -> None:
    if mine.shape != found.shape or mine.dtype != found.dtype or not bool(torch.isfinite(found).all()):
        raise CheckpointError(
            f"{folder}: the snapshot has a tensor {tuple(found.shape)} of {found.dtype} where this model has "
            f"{tuple(mine.shape)} of {mine.dtype}. Give an empty folder to begin anew."
        )

"""Recover one block after the other, where the gradients of the whole model do not fit.

Each block learns to make the teacher's hidden states out of what the blocks before it, recovered already,
make of the batch. Only that block has a graph and moments of an optimizer.

Source: Nagel et al. 2020 (AdaRound, arXiv:2004.10568) and Li et al. 2021 (BRECQ, arXiv:2102.05426), who
reconstruct quantized models layer by layer and block by block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lowrank.distillation.distributed import agreed, process_number
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.snapshots import Snapshot
from lowrank.distillation.trainer import (
    Best,
    Trainer,
    TrainingBudget,
    TrainingConfig,
    last_snapshot,
    mean_distance,
)
from lowrank.errors import LowRankError
from lowrank.inspection.contexts import training_only

EVALUATIONS = 2
"""How often a block looks at the held-out batches, beside the first time; each looks at the model, too."""


class BlockwiseTrainer:
    """A training run for each block, and the best state of the whole model between them.

    Args:
        student: The compressed model, frozen.
        distillation_loss: How far it is from its teacher.
        blocks: What is trained of each block, by its name and in their order; nothing is in two of them.
        budget: How long for all blocks together; each gets the same.
        training: Data and options.
        folder: Where snapshots go.

    Raises:
        LowRankError: If there are fewer steps than blocks.
    """

    def __init__(
        self,
        student: nn.Module,
        distillation_loss: DistillationLoss,
        blocks: Mapping[str, Sequence[nn.Parameter]],
        budget: TrainingBudget,
        training: TrainingConfig,
        folder: Path | None = None,
    ) -> None:
        if budget.steps is not None and budget.steps < len(blocks):
            raise LowRankError(f"steps={budget.steps} for {len(blocks)} blocks: give at least one for each.")
        self._student, self._loss, self._blocks = student, distillation_loss, list(blocks.items())
        self._budget, self._training, self._folder = budget, training, folder
        self._parameters = [parameter for own in blocks.values() for parameter in own]
        self._device = self._parameters[0].device
        self._done = 0
        start = time.monotonic()
        self.best = Best(self._parameters, self._mean_distance())
        self._look_seconds = time.monotonic() - start

    def _mean_distance(self) -> float:
        with self._loss.listening():
            return mean_distance(self._loss.distance, self._training.held, self._device)

    def train(self) -> None:
        """Train the blocks in their order, and look at the whole model after each."""
        while self._done < len(self._blocks) and self._progress() < 1:
            budget = self._budget.part(self._done, len(self._blocks))
            self._train_block(*self._blocks[self._done], budget)
            self._budget.steps_done += budget.steps_done
            self._done += 1
            self.best.offer(self._mean_distance())
            self._keep()

    def _progress(self) -> float:
        self._budget.reserved = (len(self._blocks) - self._done) * self._look_seconds
        return agreed(self._budget.progress(), self._device)

    def _train_block(self, name: str, parameters: Sequence[nn.Parameter], budget: TrainingBudget) -> None:
        training = replace(self._training, evaluations=EVALUATIONS, seed=self._training.seed + self._done)
        with training_only(self._student, parameters):
            run = Trainer(partial(self._loss.block_distance, name), parameters, budget, training)
            run.train(f"recovering {name}")
            run.best.restore()

    def _keep(self) -> None:
        if self._folder is None or process_number() > 0:
            return
        Snapshot(
            self._budget.steps_done,
            self._done / len(self._blocks),
            self.best.value,
            self._parameters,
            self.best.kept,
            blocks=self._done,
        ).save(self._folder)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on after the last block in the folder, if there is a snapshot."""
        found = last_snapshot(self._folder, self._parameters, self._device, blockwise=True)
        if found is None or found.blocks is None:
            return
        self._done = found.blocks
        self._budget.go_on_from(found.steps, found.progress)
        self.best = Best(self._parameters, found.best, found.kept)
        for parameter, value in zip(self._parameters, found.parameters, strict=True):
            parameter.copy_(value)

"""A training run: pace, steps, looks at held-out batches, and the best state so far.

What is trained and towards what is not known here. Under `torch.distributed` every process takes its share
of the batches, and all take the same steps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.data import Batch
from lowrank.distillation.distributed import (
    agreed,
    average_gradients,
    check_alike,
    own_part,
    process_number,
    processes,
    total,
)
from lowrank.distillation.snapshots import Snapshot
from lowrank.errors import CheckpointError, DataError
from lowrank.linalg.matmul import without_autocast

Distance = Callable[[Batch], Tensor]
"""How far the student is from its teacher on one batch, as a scalar with a graph."""


def schedule(done: float) -> float:
    """Return the learning rate over its peak when the fraction ``done`` of the time has passed."""
    if done < 0.05:
        return 0.05 + 0.95 * done / 0.05
    return 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))


def shuffled(items: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """Yield ``items`` without end, each pass in another order; the global random state is not touched."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index]


def last_snapshot(
    folder: Path | None, parameters: Sequence[Tensor], device: torch.device, blockwise: bool
) -> Snapshot | None:
    """Return what `Snapshot.load` finds, the same in every process; ``None`` without a folder.

    Raises:
        CheckpointError: As `Snapshot.load`, or if the processes do not find the same.
    """
    found = Snapshot.load(folder, parameters, blockwise) if folder is not None else None
    unlike = CheckpointError(
        f"{folder}: the processes find different snapshots. Give all a folder that all can read."
    )
    check_alike(found.steps if found else 0, device, unlike)
    return found


@torch.no_grad()
def mean_distance(distance: Distance, held: Sequence[Batch], device: torch.device) -> float:
    """Return the mean distance over the held-out batches, the same in every process."""
    return total(sum(float(distance(batch)) for batch in own_part(held)), device) / len(held)


def check_finite_distance(distance: float, given: Sequence[Batch]) -> None:
    """Refuse batches on which student and teacher are NaN or infinitely far apart before any training.

    Raises:
        DataError: If they are.
    """
    if not math.isfinite(distance):
        numbers = ", ".join(str(batch.index) for batch in given)
        raise DataError(
            f"Batch {numbers}: the distance of the compressed model to its teacher is {distance}. The data "
            "or a model hold NaN or infinite values, or overflow in half precision."
        )


@dataclass
class TrainingBudget:
    """How much of the time, or of the steps, has passed."""

    minutes: float | None
    steps: int | None
    steps_done: int = 0
    reserved: float = 0.0  # seconds, for the last look at the held-out batches

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    def progress(self) -> float:
        """Return the fraction that is over; above 1 where more time has passed than there was."""
        if self.steps is not None:
            return self.steps_done / self.steps
        assert self.minutes is not None
        return (time.monotonic() - self._start + self.reserved) / (60 * self.minutes)

    def part(self, number: int, parts: int) -> TrainingBudget:
        """Return the pace of one of several parts: an even share of the steps, or of the time left."""
        if self.steps is not None:
            return TrainingBudget(None, self.steps * (number + 1) // parts - self.steps * number // parts)
        assert self.minutes is not None
        left = self.minutes * max(1e-9, 1 - self.progress())
        return TrainingBudget(left / (parts - number), None)

    def go_on_from(self, steps: int, progress: float) -> None:
        """Count what an earlier run has done as passed."""
        self.steps_done = steps
        if self.minutes is not None:
            self._start -= progress * 60 * self.minutes


@dataclass(frozen=True)
class TrainingConfig:
    """What every run of one call has in common.

    Args:
        train: Batches to train on.
        held: Batches that choose the state to keep.
        learning_rate: Its peak.
        evaluations: How often the held-out batches are looked at, beside the first time.
        seed: Seed of the order of batches.
        progress: Show a progress bar.
    """

    train: Sequence[Batch]
    held: Sequence[Batch]
    learning_rate: float
    evaluations: int
    seed: int
    progress: bool


class Trainer:
    """A training run: what it has done, and what is best so far.

    Args:
        distance: What is made small.
        parameters: What is trained, the same in every process.
        budget: How long.
        training: Data and options.
        folder: Where snapshots go.
    """

    def __init__(
        self,
        distance: Distance,
        parameters: Sequence[nn.Parameter],
        budget: TrainingBudget,
        training: TrainingConfig,
        folder: Path | None = None,
    ) -> None:
        self._distance, self._parameters, self._budget = distance, parameters, budget
        self._training, self._folder = training, folder
        self._device = parameters[0].device
        self._optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
        self._looked = 0  # of `evaluations`
        self._whole = True  # False while a step changes one parameter after the other
        start = time.monotonic()
        self.best = Best(parameters, mean_distance(distance, training.held, self._device))
        budget.reserved = time.monotonic() - start

    def train(self, title: str = "recovering") -> None:
        """Train until the time is over, or the loss is not finite any more."""
        try:
            self._train(title)
        except BaseException:
            self._keep()
            raise

    def _train(self, title: str) -> None:
        order = shuffled(self._training.train, self._training.seed)
        order = itertools.islice(
            order, self._budget.steps_done * processes() + process_number(), None, processes()
        )
        hidden = (
            None if self._training.progress and process_number() == 0 else True
        )  # None: on terminals only
        with tqdm(total=1000, desc=title, disable=hidden, bar_format="{l_bar}{bar}| {postfix}") as bar:
            while (done := agreed(self._budget.progress(), self._device)) < 1:
                if (due := int(done * self._training.evaluations)) > self._looked:
                    self._look(due)
                batch = next(order)
                loss = self._step(batch, done)
                if not math.isfinite(loss):
                    self._check(batch)
                    return  # the best state so far is restored
                bar.n = int(1000 * done)
                bar.set_postfix_str(
                    f"step {self._budget.steps_done}, loss {loss:.4f}, held out {self.best.value:.4f}"
                )
            self._look(self._training.evaluations)

    def _step(self, batch: Batch, done: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * schedule(done)
        loss = self._distance(batch)
        if not loss.requires_grad:
            raise DataError(
                f"Batch {batch.index}: no gradient of the distance to the teacher reaches what is trained. "
                "Does the model detach its outputs, or run without gradients?"
            )
        value = total(float(loss.detach()), self._device) / processes()
        if math.isfinite(value):
            # not backward(), on which a wrapper's hooks wait to average all that it knows
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            average_gradients(self._parameters)
            with without_autocast():
                nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._whole = False
            self._optimizer.step()
            self._budget.steps_done += 1
            self._whole = True
            self._optimizer.zero_grad(set_to_none=True)
        return value

    def _check(self, batch: Batch) -> None:
        """Tell data that are at fault from training that has diverged: in the best state they are, too."""
        self.best.restore()
        with torch.no_grad():
            check_finite_distance(float(self._distance(batch)), [batch])

    def _look(self, due: int) -> None:
        start = time.monotonic()
        self.best.offer(mean_distance(self._distance, self._training.held, self._device))
        self._looked = due
        self._keep()
        self._budget.reserved = time.monotonic() - start  # what the last look will take, by the latest

    def _keep(self) -> None:
        """Write a snapshot, if a folder was given and there is something to go on from.

        Only process 0 writes, and it waits for no other, so that one that fails does not hold it up.
        """
        if self._folder is None or not self._budget.steps_done or process_number() > 0:
            return
        if not self._whole:
            return  # Ctrl-C within a step: the snapshot before is the last from which a run goes on as it was
        if not all(bool(parameter.isfinite().all()) for parameter in self._parameters):
            return  # training has diverged
        Snapshot(
            self._budget.steps_done,
            min(1.0, self._budget.progress()),
            self.best.value,
            self._parameters,
            self.best.kept,
            (self._moments("exp_avg"), self._moments("exp_avg_sq")),
            evaluations=self._looked,
        ).save(self._folder)

    def _moments(self, key: str) -> list[Tensor]:
        state = self._optimizer.state
        return [state[parameter].get(key, torch.zeros_like(parameter)) for parameter in self._parameters]

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the snapshot in the folder, if there is one."""
        found = last_snapshot(self._folder, self._parameters, self._device, blockwise=False)
        if found is None:
            return
        self._budget.go_on_from(found.steps, found.progress)
        self._looked = found.evaluations
        self.best = Best(self._parameters, found.best, found.kept)
        for number, parameter in enumerate(self._parameters):
            parameter.copy_(found.parameters[number])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(found.steps)),
                "exp_avg": found.moments[0][number],
                "exp_avg_sq": found.moments[1][number],
            }


class Best:
    """Remembers the parameters at the smallest distance seen."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], value: float, kept: Sequence[Tensor] | None = None
    ) -> None:
        self._parameters, self.value = parameters, value
        self.kept = list(kept) if kept is not None else self._copy()

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def offer(self, value: float) -> None:
        """Keep the present parameters if they are better."""
        if value < self.value:
            self.value, self.kept = value, self._copy()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept parameters back."""
        for parameter, kept in zip(self._parameters, self.kept, strict=True):
            parameter.copy_(kept)

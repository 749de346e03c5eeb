"""Recover: distil what compression has lost from the dense model back into the factors.

The compressed model is trained to match its teacher's outputs and hidden states. Only factors, biases
and norms are trained; embeddings and heads stay. Held-out batches decide which state is kept, so the
model that comes back is never worse on them than the one that was given.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.batches import Batch, batches
from lowrank.distillation import Lesson
from lowrank.errors import DataError, LowRankError
from lowrank.modes import training_only
from lowrank.nn import LowRankLinear
from lowrank.obstacles import check_model
from lowrank.snapshots import Snapshot

EVALUATIONS = 8
"""How often the held-out batches are looked at, beside the first time."""


def recover(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None = None,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float = 3e-4,
    hidden_weight: float = 1.0,
    mixed_precision: bool | None = None,
    held_out: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    snapshots: str | Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """Train the factors of ``model``, in place, until it does what ``teacher`` does.

    Args:
        model: A compressed model. Its factors, biases and norms are trained, in their dtype.
        teacher: The dense model that it was made from, on any device; it is not changed.
        data: As for `lowrank.calibrate`. The batches are kept in memory and visited in random order.
        tokenizer: A tokenizer of transformers, for strings.
        minutes: How long, looking at held-out batches included. Give either this or ``steps``.
        steps: How many batches to train on.
        learning_rate: Its peak; it rises over the first twentieth and falls to zero as a cosine.
        hidden_weight: How much hidden states count beside the outputs; 0 spares them.
        mixed_precision: Whether matrix products run in bfloat16 (`torch.autocast`); by default where the
            processor has instructions for that, three times as fast. Parameters stay as they are.
        held_out: Batches not trained on, which choose the state that is kept; by default a sixteenth,
            at most 8.
        batch_size: Strings per batch.
        max_length: Longest string in tokens; by default what the tokenizer allows, at most 512.
        seed: Seed of the order of batches; the global random state is not touched.
        snapshots: A folder that keeps where the run stands, written whenever the held-out batches are
            looked at, and on an interrupt. The same call made again goes on from there.
        progress: Show a progress bar with the loss on a terminal.

    Returns:
        The same model in its best state on the held-out batches, perhaps the one that it came in.

    Raises:
        DataError: If there are fewer than two batches, or teacher and model return different things.
        CheckpointError: If the snapshot is damaged or of another model, or cannot be written.
        LowRankError: If nothing in the model is factorized, or not exactly one duration is given.

    Source: Hinton et al. 2015 (arXiv:1503.02531); the optimizer: Loshchilov & Hutter 2019 (AdamW).
    """
    _check(model, teacher, minutes, steps)
    device = next(p.device for p in model.parameters())
    stream = batches(
        data, tokenizer, device=device, batch_size=batch_size, max_length=max_length, by_length=True
    )
    every = list(stream)
    train, held = _split(every, held_out)
    mixed = _multiplies_bfloat16(device) if mixed_precision is None else mixed_precision
    lesson = Lesson(model, teacher, hidden_weight, torch.autocast(device.type, torch.bfloat16, mixed))
    parameters = trainable(model)
    with training_only(model, parameters), lesson.listening():
        folder = Path(snapshots) if snapshots is not None else None
        run = _Run(lesson, parameters, held, _Pace(minutes, steps), learning_rate, folder)
        try:
            run.resume()
            run.train(_shuffled(train, seed), progress)
        finally:
            try:
                run.keep()
            finally:
                run.best.restore()
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return what recovery trains: the factors, and every vector (biases and norms) beside them."""
    factors = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LowRankLinear)
        for parameter in module.parameters()
    }
    return [p for p in model.parameters() if p.is_floating_point() and (id(p) in factors or p.ndim == 1)]


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is fast here, and not only possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _check(model: nn.Module, teacher: nn.Module, minutes: float | None, steps: int | None) -> None:
    check_model(model)
    check_model(teacher)
    if model is teacher:
        raise LowRankError("The teacher is the compressed model itself. Keep a copy of the dense model.")
    if not any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise LowRankError(
            "The model has no factorized layer, so there is nothing to recover. Compress it first."
        )
    if (minutes is None) == (steps is None):
        raise LowRankError(f"Give either minutes or steps; got minutes={minutes!r} and steps={steps!r}.")
    if (minutes if minutes is not None else steps) <= 0:  # type: ignore[operator]
        raise LowRankError(f"minutes={minutes!r}, steps={steps!r}: the duration must be positive.")


def _split(every: list[Batch], held_out: int | None) -> tuple[list[Batch], list[Batch]]:
    """Hold out batches spread evenly over the data."""
    count = min(8, max(1, len(every) // 16)) if held_out is None else held_out
    if not 1 <= count < len(every):
        raise DataError(
            f"{len(every)} batches, of which {count} would be held out: recovery needs at least one of "
            "each kind. Give more data, or smaller batches."
        )
    stride = len(every) / count
    chosen = {int((i + 0.5) * stride) for i in range(count)}
    return [b for i, b in enumerate(every) if i not in chosen], [every[i] for i in sorted(chosen)]


def schedule(done: float) -> float:
    """Return the learning rate over its peak when the fraction ``done`` of the time has passed."""
    if done < 0.05:
        return 0.05 + 0.95 * done / 0.05
    return 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))


def _shuffled(items: list[Batch], seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index]


@dataclass
class _Pace:
    """How much of the time, or of the steps, has passed."""

    minutes: float | None
    steps: int | None
    steps_done: int = 0
    reserved: float = 0.0  # seconds, for the last look at the held-out batches

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    def progress(self) -> float:
        if self.steps is not None:
            return self.steps_done / self.steps
        assert self.minutes is not None
        return (time.monotonic() - self._start + self.reserved) / (60 * self.minutes)

    def go_on_from(self, steps: int, progress: float) -> None:
        self.steps_done = steps
        if self.minutes is not None:
            self._start -= progress * 60 * self.minutes


class _Run:
    """A training run: what it has done, and what is best so far."""

    def __init__(
        self,
        lesson: Lesson,
        parameters: list[nn.Parameter],
        held: list[Batch],
        pace: _Pace,
        learning_rate: float,
        folder: Path | None,
    ) -> None:
        self._lesson, self._parameters, self._held, self._pace = lesson, parameters, held, pace
        self._learning_rate, self._folder = learning_rate, folder
        self._optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        self._looked = 0
        start = time.monotonic()
        self.best = _Best(parameters, lesson.mean_distance(held))
        pace.reserved = time.monotonic() - start

    def train(self, order: Iterator[Batch], progress: bool) -> None:
        """Train until the time is over, or the loss is not finite any more."""
        order = itertools.islice(order, self._pace.steps_done, None)
        shown = {"disable": None if progress else True, "bar_format": "{l_bar}{bar}| {postfix}"}
        with tqdm(total=1000, desc="recovering", **shown) as bar:
            while (done := self._pace.progress()) < 1:
                loss = self._step(next(order), done)
                if not math.isfinite(loss):
                    return  # the best state so far is restored
                bar.n = int(1000 * done)
                bar.set_postfix_str(
                    f"step {self._pace.steps_done}, loss {loss:.4f}, held out {self.best.value:.4f}"
                )
                if int(done * EVALUATIONS) > self._looked:
                    self._looked = int(done * EVALUATIONS)
                    self._look()
            self._look()

    def _step(self, batch: Batch, done: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * schedule(done)
        loss = self._lesson.distance(batch)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._pace.steps_done += 1
        return value

    def _look(self) -> None:
        start = time.monotonic()
        self.best.offer(self._lesson.mean_distance(self._held))
        self.keep()
        self._pace.reserved = time.monotonic() - start  # what the last look will take, by the latest

    def keep(self) -> None:
        """Write a snapshot, if a folder was given and there is something to keep."""
        if self._folder is None or not self._pace.steps_done:
            return
        Snapshot(
            self._pace.steps_done,
            min(1.0, self._pace.progress()),
            self.best.value,
            self._parameters,
            self.best.kept,
            (self._moments("exp_avg"), self._moments("exp_avg_sq")),
        ).save(self._folder)

    def _moments(self, key: str) -> list[Tensor]:
        state = self._optimizer.state
        return [state[parameter].get(key, torch.zeros_like(parameter)) for parameter in self._parameters]

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the snapshot in the folder, if there is one."""
        found = Snapshot.load(self._folder, self._parameters) if self._folder is not None else None
        if found is None:
            return
        self._pace.go_on_from(found.steps, found.progress)
        self._looked = int(found.progress * EVALUATIONS)
        self.best = _Best(self._parameters, found.best, found.kept)
        for number, parameter in enumerate(self._parameters):
            parameter.copy_(found.parameters[number])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(found.steps)),
                "exp_avg": found.moments[0][number],
                "exp_avg_sq": found.moments[1][number],
            }


class _Best:
    """Remembers the parameters at the smallest distance seen."""

    def __init__(
        self, parameters: list[nn.Parameter], value: float, kept: Sequence[Tensor] | None = None
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

"""Recover: distil what compression has lost from the dense model back into the factors.

The compressed model is trained to match its teacher's outputs and hidden states. Only factors, biases
and norms are trained; embeddings and heads stay. Held-out batches decide which state is kept, so the
model that comes back is never worse on them than the one that was given.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.batches import Batch, batches
from lowrank.blocks import find_blocks, outputs_of
from lowrank.distillation import distance
from lowrank.errors import DataError, LowRankError
from lowrank.nn import LowRankLinear
from lowrank.obstacles import check_model

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
        progress: Show a progress bar with the loss on a terminal.

    Returns:
        The same model in its best state on the held-out batches, perhaps the one that it came in.

    Raises:
        DataError: If there are fewer than two batches, or teacher and model return different things.
        LowRankError: If nothing in the model is factorized, or not exactly one duration is given.

    Source: Hinton et al. 2015 (arXiv:1503.02531); the optimizer: Loshchilov & Hutter 2019 (AdamW).
    """
    _check(model, teacher, minutes, steps)
    device = next(p.device for p in model.parameters())
    stream = batches(data, tokenizer, device=device, batch_size=batch_size, max_length=max_length)
    every = list(stream)
    train, held = _split(every, held_out)
    mixed = _multiplies_bfloat16(device) if mixed_precision is None else mixed_precision
    lesson = _Lesson(model, teacher, hidden_weight, torch.autocast(device.type, torch.bfloat16, mixed))
    parameters = trainable(model)
    pace = _Pace(minutes, steps)
    with _training_only(model, parameters), lesson.listening():
        start = time.monotonic()
        best = _Best(parameters, lesson.mean(held))
        pace.reserved = time.monotonic() - start
        try:
            _train(lesson, train, held, parameters, best, pace, learning_rate, seed, progress)
        finally:
            best.restore()
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


def _train(
    lesson: _Lesson,
    train: list[Batch],
    held: list[Batch],
    parameters: list[nn.Parameter],
    best: _Best,
    pace: _Pace,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    order = _shuffled(train, seed)
    looked = 0
    bar = tqdm(
        total=1000,
        desc="recovering",
        disable=None if progress else True,
        bar_format="{l_bar}{bar}| {postfix}",
    )
    with bar:
        while (done := pace.progress()) < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(done)
            loss = lesson.distance(next(order))
            value = float(loss.detach())
            if not math.isfinite(value):
                break  # the best state so far is restored
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pace.steps_done += 1
            bar.n = int(1000 * min(1.0, done))
            bar.set_postfix_str(f"step {pace.steps_done}, loss {value:.4f}, held out {best.value:.4f}")
            if int(done * EVALUATIONS) > looked:
                looked = int(done * EVALUATIONS)
                best.offer(lesson.mean(held))
        best.offer(lesson.mean(held))


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


class _Lesson:
    """Shows one batch to teacher and student, and tells how far apart they are."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, hidden_weight: float, autocast: torch.autocast
    ) -> None:
        self._autocast = autocast
        self._model, self._teacher, self._hidden_weight = model, teacher, hidden_weight
        self._device = next((p.device for p in teacher.parameters()), None)
        self._found: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the hidden states of both models."""
        blocks, its = (find_blocks(m) if self._hidden_weight else {} for m in (self._model, self._teacher))
        training = {module: module.training for module in self._teacher.modules()}
        try:
            self._teacher.eval()
            with outputs_of(blocks) as self._found, outputs_of(its) as self._wanted:
                yield
        finally:
            for module, was in training.items():
                module.training = was

    def distance(self, batch: Batch) -> Tensor:
        """Return the distance on one batch, with a graph where gradients are enabled."""
        with self._autocast:
            with torch.no_grad():
                targets = batch.on(self._device).call(self._teacher)
            outputs = batch.call(self._model)
        return distance(outputs, targets, batch, self._found, self._wanted, self._hidden_weight)

    @torch.no_grad()
    def mean(self, held: list[Batch]) -> float:
        """Return the mean distance over the held-out batches."""
        return sum(float(self.distance(batch)) for batch in held) / len(held)


class _Best:
    """Remembers the parameters at the smallest distance seen."""

    def __init__(self, parameters: list[nn.Parameter], value: float) -> None:
        self._parameters, self.value = parameters, value
        self._kept = self._copy()

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def offer(self, value: float) -> None:
        """Keep the present parameters if they are better."""
        if value < self.value:
            self.value, self._kept = value, self._copy()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept parameters back."""
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)


@contextlib.contextmanager
def _training_only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let only ``parameters`` have gradients, without dropout, and leave the model as it was."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in required}
    try:
        model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, requires in required.items():
            parameter.requires_grad_(requires)
            parameter.grad = gradients[parameter]

"""Calibrate: run a model over data once, and try on parts of it what the others gave.

Where the data are many, the last part waits until factors of the others can be tried on it. Where they are
few, each part is tried with what the others gave, which costs a second run.

Source: cross-fitting (Stone 1974).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank.calibration.collector import Collector
from lowrank.calibration.data import Batch
from lowrank.calibration.held_out import HeldOutValidation, trial_factorizations
from lowrank.calibration.held_out_errors import HeldOutErrors, added
from lowrank.calibration.objectives import of_loss, self_supervised
from lowrank.calibration.statistics import Stats
from lowrank.errors import DataError, FewTokensWarning, warn
from lowrank.inspection.contexts import check_has_data, training_only
from lowrank.inspection.devices import device_of
from lowrank.inspection.inspection import Inspection

WAITING_TOKENS = 16_384
"""The most tokens of batches that wait in memory until factors fitted to the others are tried on them."""

ENOUGH_SAMPLES = 64
"""Samples in the last part with which it alone is tried: a mean over n of them is known to some 1/√n."""

ENOUGH_TOKENS = 2048
"""Tokens in the last part with which it alone is tried, however few the samples."""

ENOUGH_TERMS = 1024
"""Terms of the objective below which its probes or labels are drawn more than once for each."""

ENOUGH_TRIALS = 256
"""Samples below which more than one of these draws meets a trial."""

MOST_DRAWS = 16
"""How often at most: a draw costs a backward pass, and more of them tell nothing new about other texts."""

TOKENS_PER_FEATURE = 4
"""Fewer warn. In T tokens of n independent features the variances of directions spread over (1 ± √(n/T))² of
the true ones: with four tokens for each the smallest, which factors drop, look four times too small."""


def collect(
    seen: Inspection,
    layers: Collection[str],
    stream: Iterable[Batch],
    loss: Callable[[Any, Any], Tensor] | str | None,
    *,
    heads: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Stats:
    """Sum the statistics of ``layers`` over batches; see `lowrank.calibrate` for the arguments and errors.

    Of the layers some may be embeddings; ``heads`` says by name which layers are tied to them.
    """
    if not (loss is None or callable(loss) or (isinstance(loss, str) and loss == "auto")):
        raise DataError(f'loss={loss!r}: give "auto", a function loss(outputs, batch), or None.')
    check_has_data(seen.model)
    users = dict(heads or {}) if loss is not None else {}  # without gradients, logits have another unit
    bar = tqdm(total=_length(stream), desc="calibrating", unit="batch", disable=None if progress else True)
    with bar, training_only(seen.model), torch.set_grad_enabled(loss is not None):
        stats = _Calibration(seen, layers, loss, users, tokenizer, seed, bar).stats(stream)
    warn_of_few_tokens(stats)
    return stats


class _Calibration:
    """Runs a model over data, with a collector and trials; the arguments are those of `collect`."""

    def __init__(
        self,
        seen: Inspection,
        layers: Collection[str],
        loss: Callable[[Any, Any], Tensor] | str | None,
        heads: Mapping[str, str],
        tokenizer: Any,
        seed: int,
        bar: tqdm[Any],
    ) -> None:
        self._model, self._loss, self._heads, self._tokenizer, self._bar = (
            seen.model,
            loss,
            heads,
            tokenizer,
            bar,
        )
        self._collector = functools.partial(Collector, seen, layers, loss is not None, heads)
        self._generator = torch.Generator(device_of(seen.model)).manual_seed(seed)

    def stats(self, stream: Iterable[Batch]) -> Stats:
        """Return the statistics of all batches, and how trials fared."""
        waiting: list[Batch] = []
        collector = self._collector()
        with collector.listening():
            for batch in _all_but_few(stream, waiting):
                self._collect(collector, batch)
        if collector.tokens:
            return self._tried_on_the_last_part(waiting, collector)
        collector = self._collector(draws=self._draws(waiting))
        last = _last_part(waiting)
        if sum(x.samples for x in last) >= ENOUGH_SAMPLES or sum(x.tokens for x in last) >= ENOUGH_TOKENS:
            return self._tried_on_the_last_part(waiting, collector)
        return self._cross_fitted(waiting, collector.draws)

    def _tried_on_the_last_part(self, waiting: Sequence[Batch], collector: Collector) -> Stats:
        """Collect from all batches, from the last part while factors of the others are tried on it."""
        last = _last_part(waiting)
        with collector.listening():
            for batch in waiting:
                if not batch.held_out:
                    self._collect(collector, batch)
        if not last:
            _warn_of_nothing_held_out()
            return Collector.stats([collector], self._tokenizer)
        validation = self._trial([collector], collector.draws)
        with validation.listening(), collector.listening():
            for batch in last:
                validation.batch = batch
                self._collect(collector, batch)
        return replace(Collector.stats([collector], self._tokenizer), held_out=validation.found())

    def _cross_fitted(self, waiting: Sequence[Batch], draws: int) -> Stats:
        """Collect from each part, then run each once more while factors of the others are tried on it."""
        parts: dict[int, list[Batch]] = {}
        for batch in waiting:
            parts.setdefault(batch.part, []).append(batch)
        collectors = {part: self._collector(draws=draws) for part in parts or [0]}
        for part, collector in collectors.items():
            with collector.listening():
                for batch in parts.get(part, ()):
                    self._collect(collector, batch)
        tried = min(draws, math.ceil(ENOUGH_TRIALS / max(1, sum(batch.samples for batch in waiting))))
        held: dict[str, HeldOutErrors] = {}
        for part in parts if len(parts) > 1 else ():
            validation = self._trial([other for key, other in collectors.items() if key != part], tried)
            with validation.listening():
                for batch in parts[part]:
                    validation.batch = batch
                    self._run(batch, tried, refuse=False)
            held = added(held, validation.found())
        if len(parts) == 1:
            _warn_of_nothing_held_out()
        return replace(Collector.stats(list(collectors.values()), self._tokenizer), held_out=held)

    def _collect(self, collector: Collector, batch: Batch) -> None:
        collector.start(batch)
        collector.terms += self._run(batch, collector.draws)
        self._bar.update()

    def _trial(self, collectors: Sequence[Collector], draws: int) -> HeldOutValidation:
        stats = Collector.stats(collectors, self._tokenizer)
        factorizations = trial_factorizations(self._model, stats, self._heads)
        return HeldOutValidation(self._model, factorizations, self._loss is not None, draws)

    def _draws(self, few: Sequence[Batch]) -> int:
        """Return how often the objective is to be drawn for each of few batches."""
        if not few or not isinstance(self._loss, str):
            return 1
        first = few[0]
        with torch.no_grad():
            terms = self_supervised(first.call(self._model), first, self._generator).terms
        all_terms = terms * sum(batch.samples for batch in few) / max(1, first.samples)
        return min(MOST_DRAWS, max(1, math.ceil(ENOUGH_TERMS / max(1, all_terms))))

    def _run(self, batch: Batch, draws: int, refuse: bool = True) -> int:
        """Run the model forward and, with a loss, backward for each draw of the objective.

        Args:
            batch: What to run it on.
            draws: How often.
            refuse: Whether no gradient at all is an error. It is none in a trial, which not all layers take
                part in.

        Returns:
            The number of the objective's terms.
        """
        outputs = batch.call(self._model)
        if self._loss is None:
            return 0
        for draw in range(draws):
            if isinstance(self._loss, str):
                made = self_supervised(outputs, batch, self._generator)
            else:
                made = of_loss(self._loss, outputs, batch)
            if not made.total.requires_grad and not refuse:
                break
            if not made.total.requires_grad:
                raise DataError(
                    f"Batch {batch.index}: no gradient of the objective reaches a linear layer. Pass "
                    "loss=None to do without gradients."
                )
            made.total.backward(retain_graph=draw < draws - 1)  # type: ignore[no-untyped-call]
        return made.terms


def _last_part(waiting: Sequence[Batch]) -> list[Batch]:
    return [batch for batch in waiting if batch.held_out]


def _all_but_few(stream: Iterable[Batch], waiting: list[Batch]) -> Iterator[Batch]:
    """Yield batches to run as they come, and let some wait.

    All of them wait while they are few. Of more, some of the last part do.
    """
    tokens, few = 0, True
    for batch in stream:
        if few and tokens + batch.tokens > WAITING_TOKENS:
            few = False
            yield from (early for early in waiting if not early.held_out)
            waiting[:] = _last_part(waiting)
            tokens = sum(early.tokens for early in waiting)
        fits = tokens + batch.tokens <= WAITING_TOKENS or not waiting
        if (few or batch.held_out) and fits:
            waiting.append(batch)
            tokens += batch.tokens
        else:
            yield batch


def _warn_of_nothing_held_out() -> None:
    warn(
        "Calibration has held out no batch, so nothing tells how far its predictions hold on other data. "
        "Give more data, or smaller batches.",
        FewTokensWarning,
    )


def warn_of_few_tokens(stats: Stats) -> None:
    """Warn where factors made with ``stats`` fit their tokens too well, of the layer that read the least."""
    full = {name: moments for name, moments in stats.inputs.items() if moments.products.ndim == 2}
    name = min(full, key=lambda name: full[name].weight / len(full[name].total), default=None)
    if name is None:
        return
    tokens, features = int(full[name].weight), len(full[name].total)
    if tokens < TOKENS_PER_FEATURE * features:
        wanted = TOKENS_PER_FEATURE * features
        warn(
            f"{name}: calibrated on {tokens:,} tokens, and reads {features:,} features. With fewer than "
            f"{wanted:,} tokens the factors fit these tokens better than others. Give more data.",
            FewTokensWarning,
        )


def _length(stream: Iterable[Batch]) -> int | None:
    return len(stream) if isinstance(stream, Sized) else None

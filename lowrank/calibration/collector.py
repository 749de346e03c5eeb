"""Calibrate: run the model over data once, and sum what each linear layer reads and how much it matters.

Hooks on the layers take the inputs; a backward pass of an objective gives the outputs' gradients.
Parameters get no gradient. Products are float32 per batch and summed in float64, so the memory does
not depend on the amount of data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.data import Batch
from lowrank.calibration.embeddings import EmbeddingCollector
from lowrank.calibration.held_out import HeldOutValidation, trial_factorizations
from lowrank.calibration.moments import Gradients, HeldOutErrors, Moments
from lowrank.calibration.objectives import of_loss, self_supervised
from lowrank.calibration.statistics import Stats, added
from lowrank.errors import DataError, FewTokensWarning, StatsError, warn
from lowrank.inspection.contexts import check_has_data, hooked, training_only
from lowrank.inspection.devices import device_of
from lowrank.inspection.fingerprints import Fingerprint, fingerprint_of_tokenizer
from lowrank.inspection.inspection import Inspection
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.metric import products_of_pairs, squares, wide
from lowrank.nn import layer_type_of

WIDEST = 8192
"""Features up to which the products of all pairs are kept (0.5 GB in float64); beyond, each with itself."""

WAITING_TOKENS = 16_384
"""The most tokens of batches that wait in memory until factors fitted to the others are tried on them."""

ENOUGH_SAMPLES = 64
"""Samples after which no further part is tried: a mean over n of them is known to some 1/√n."""

ENOUGH_TERMS = 1536
"""Terms of the objective below which its probes or labels are drawn more than once for each."""

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
    model = seen.model
    check_has_data(model)
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    differentiate = loss is not None
    users = dict(heads or {}) if differentiate else {}  # without gradients, logits have another unit
    collector = _Collector(seen, layers, differentiate, users)
    held: dict[str, HeldOutErrors] = {}
    samples = 0
    bar = tqdm(total=_length(stream), desc="calibrating", unit="batch", disable=None if progress else True)

    def run(batch: Batch) -> None:
        collector.start(batch)
        collector.terms += _pass(model, batch, loss, generator, collector.draws)
        bar.update()

    with bar, training_only(model), torch.set_grad_enabled(differentiate):
        with collector.listening():
            waiting, parts = _run_but_for_parts(stream, run)
        draws = _draws(model, waiting, generator) if isinstance(loss, str) and len(parts) > 1 else 1
        for part in parts:
            if len(parts) > 1:
                collector = _Collector(seen, layers, differentiate, users)
                collector.draws = draws
                with collector.listening():
                    others = [batch for batch in waiting if batch.part != part]
                    for batch in others:
                        run(batch)
            trials = trial_factorizations(model, collector.stats(tokenizer), users)
            validation = HeldOutValidation(model, trials, differentiate, draws)
            with validation.listening(), collector.listening():
                mine = [batch for batch in waiting if batch.part == part]
                for batch in mine:
                    validation.batch = batch
                    run(batch)
                samples += sum(batch.samples for batch in mine)
            held = added(held, validation.found())
            if samples >= ENOUGH_SAMPLES:
                break
    stats = replace(collector.stats(tokenizer), held_out=held)
    if not parts:
        _warn_of_one_batch()
    warn_of_few_tokens(stats)
    return stats


def _run_but_for_parts(
    stream: Iterable[Batch], run: Callable[[Batch], None]
) -> tuple[list[Batch], list[int]]:
    """Run batches as they come, but let some wait, to be parts on which the others are tried in turn.

    All of them wait while they are few. More are run, but for some of the last part.

    Returns:
        The batches that wait, and the parts to try; of no part where there is only one batch.
    """
    waiting: list[Batch] = []
    tokens, few = 0, True
    for batch in stream:
        if few and tokens + batch.tokens > WAITING_TOKENS:
            few = False
            for early in waiting:
                if not early.held_out:
                    run(early)
            waiting = [early for early in waiting if early.held_out]
            tokens = sum(early.tokens for early in waiting)
        if (few or batch.held_out) and tokens + batch.tokens <= WAITING_TOKENS:
            waiting.append(batch)
            tokens += batch.tokens
        else:
            run(batch)
    parts = sorted({batch.part for batch in waiting}, reverse=True)
    if few and len(parts) < 2:
        for batch in waiting:
            run(batch)
        return [], []
    return waiting, parts


def _draws(model: nn.Module, few: Sequence[Batch], generator: torch.Generator) -> int:
    """Return how often the objective is to be drawn for each of few batches."""
    first = few[0]
    with torch.no_grad():
        terms = self_supervised(first.call(model), first, generator).terms
    all_terms = terms * sum(batch.samples for batch in few) / max(1, first.samples)
    return min(MOST_DRAWS, max(1, math.ceil(ENOUGH_TERMS / max(1, all_terms))))


def _warn_of_one_batch() -> None:
    warn(
        "Calibration has got one batch, so nothing is held out to tell how far its predictions hold on other "
        "data. Give more data, or smaller batches.",
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


def _pass(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Any, Any], Tensor] | str | None,
    generator: torch.Generator,
    draws: int,
) -> int:
    """Run the model forward and, with a loss, backward for each draw of the objective.

    Returns:
        The number of the objective's terms.
    """
    outputs = batch.call(model)
    if loss is None:
        return 0
    for draw in range(draws):
        if isinstance(loss, str):
            made = self_supervised(outputs, batch, generator)
        else:
            made = of_loss(loss, outputs, batch)
        if not made.total.requires_grad:
            raise DataError(
                f"Batch {batch.index}: no gradient of the objective reaches a linear layer. Pass loss=None "
                "to do without gradients."
            )
        made.total.backward(retain_graph=draw < draws - 1)  # type: ignore[no-untyped-call]
    return made.terms


class _Collector:
    """Sums moments of inputs and products of gradients, one layer at a time, as the model runs."""

    def __init__(
        self, seen: Inspection, layers: Collection[str], differentiate: bool, heads: Mapping[str, str]
    ) -> None:
        modules = {name: seen.model.get_submodule(name) for name in layers}
        embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
        self._embeddings_seen = EmbeddingCollector(seen.model, embeddings, heads, differentiate)
        self._fingerprint = seen.fingerprint
        self._layers = {name: module for name, module in modules.items() if name not in embeddings}
        self._differentiate = differentiate
        self._inputs: dict[str, _Sums] = {}
        self._gradients: dict[str, _Sums] = {}
        self._sources: dict[str, str] = {}
        self._batch: Batch | None = None
        self._tokens = self._digest = 0
        self._seen: dict[tuple[int, int], tuple[Tensor, str]] = {}
        self.terms = 0
        self.draws = 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Attach the hooks, and remove these, and no others, at the end."""
        handles = (
            layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, layer in self._layers.items()
        )
        try:
            with hooked(handles), self._embeddings_seen.listening():
                yield
        finally:
            self._seen.clear()

    def start(self, batch: Batch) -> None:
        """Begin a batch: tensors are recognised within one forward pass only."""
        self._batch = self._embeddings_seen.batch = batch
        self._seen.clear()
        self._tokens += batch.tokens
        self._digest = (self._digest + batch.digest()) % 2**64

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            self._read(name, args[0] if args else kwargs["input"])
            if not self._differentiate:
                return output
            if not output.requires_grad:  # nothing before it has a gradient: the graph begins here
                output = output.detach().requires_grad_().clone()
            if output.requires_grad:
                output.register_hook(lambda gradient: self._felt(name, layer, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    def _read(self, name: str, tensor: Tensor) -> None:
        """Add a layer's input, unless another has read the same tensor, unchanged, in this forward pass."""
        assert self._batch is not None
        version = 0 if tensor.is_inference() else tensor._version
        known = self._seen.get((id(tensor), version))
        key = known[1] if known is not None else name
        if self._sources.setdefault(name, key) != key:
            raise StatsError(
                f"{name}: shared its input with {self._sources[name]} at first, but not in batch "
                f"{self._batch.index}. A structure that depends on the data cannot be calibrated."
            )
        if known is not None:
            return
        self._seen[id(tensor), version] = (tensor, name)
        sums = self._inputs.setdefault(name, _Sums(tensor))
        if not sums.add(self._batch.real(tensor.detach())):
            raise StatsError(
                f"{name}: reads NaN or infinite values in batch {self._batch.index}. It overflows, "
                "in half precision perhaps, or the data are not finite."
            )

    def _felt(self, name: str, layer: nn.Module, gradient: Tensor) -> None:
        """Add the gradient with respect to a layer's output, for a tall layer seen from its input."""
        assert self._batch is not None
        layer_type = layer_type_of(layer)
        assert layer_type is not None
        weight = layer_type.weight(layer).detach()
        rows = self._batch.real(gradient.detach())
        if self.draws > 1:
            rows = (
                rows.clone()
            )  # autograd adds the next draw's gradient to this tensor where the graph begins
        if _is_tall(weight):
            with without_autocast():
                rows = wide(rows) @ wide(weight)  # Wᵀ g
        sums = self._gradients.setdefault(name, _Sums(rows))
        if not sums.add(rows):
            raise StatsError(
                f"{name}: the gradient has NaN or infinite values in batch {self._batch.index}. "
                "Load the model in float32, or calibrate with loss=None."
            )

    def stats(self, tokenizer: Any) -> Stats:
        """Return the sums so far, for one draw of the objective; layers that were never called are absent."""
        inputs, draws = {}, self.draws
        for name, sums in (*self._inputs.items(), *self._gradients.items()):
            if not bool(sums.products().isfinite().all()):
                raise StatsError(
                    f"{name}: reads values, or gets gradients, whose squares float64 cannot hold. Scale the "
                    "data, or the weights before it."
                )
        for name, sums in self._inputs.items():
            inputs[name] = Moments(sums.rows, sums.total.clone(), sums.products().clone())
        gradients = {}
        for name, sums in self._gradients.items():
            layer_type = layer_type_of(self._layers[name])
            assert layer_type is not None
            tall = _is_tall(layer_type.weight(self._layers[name]))
            gradients[name] = Gradients(sums.rows // draws, sums.rows, sums.products() / draws, tall)
        fingerprint = Fingerprint(
            {name: self._fingerprint(name) for name in (*self._layers, *self._embeddings_seen.embeddings)},
            fingerprint_of_tokenizer(tokenizer),
            f"{self._digest:016x}",
        )
        embeddings = self._embeddings_seen.sums(draws)
        return Stats(
            *(fingerprint, inputs, dict(self._sources), gradients, self._tokens, self.terms),
            embeddings=embeddings,
        )


def _is_tall(weight: Tensor) -> bool:
    return weight.shape[0] > weight.shape[1]


class _Sums:
    """``Σ x`` and ``Σ x xᵀ`` over rows, in float64; of very wide rows, the diagonal of the latter.

    Rows wait until there are as many as features. Multiplying them is then worth the pass over the
    sums, and they take half of the memory of these.
    """

    def __init__(self, like: Tensor) -> None:
        size = like.shape[-1]
        self._full = size <= WIDEST
        self.rows = 0
        self.total = torch.zeros(size, dtype=torch.float64, device=like.device)
        self._products = self.total.new_zeros((size, size) if self._full else size)
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> bool:
        """Add ``rows (tokens, n)``; return whether all are finite."""
        rows = wide(rows)
        total = rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)
        self.total += total
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= rows.shape[1]:
            self._multiply()
        return bool(total.isfinite().all())

    def products(self) -> Tensor:
        """Return the products of all rows."""
        if sum(map(len, self._waiting)):
            self._multiply()
        return self._products

    def _multiply(self) -> None:
        rows = torch.cat(self._waiting)
        self._waiting.clear()
        self._products += products_of_pairs(rows) if self._full else squares(rows)

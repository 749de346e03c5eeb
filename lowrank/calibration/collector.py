"""Calibrate: run the model over data once, and sum what each linear layer reads and how much it matters.

Hooks on the layers take the inputs; a backward pass of an objective gives the outputs' gradients.
Parameters get no gradient. Products are float32 per batch and summed in float64, so the memory does
not depend on the amount of data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.data import HELD_OUT, Batch
from lowrank.calibration.embeddings import EmbeddingCollector
from lowrank.calibration.held_out import HeldOutValidation, trial_factorizations
from lowrank.calibration.moments import Gradients, Moments
from lowrank.calibration.objectives import of_loss, self_supervised
from lowrank.calibration.statistics import Stats
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

HELD_OUT_TOKENS = 16_384
"""The most tokens of held-out batches, which wait in memory."""

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
    embeddings = [name for name in layers if isinstance(model.get_submodule(name), nn.Embedding)]
    users = dict(heads or {}) if differentiate else {}  # without gradients, logits have another unit
    embeddings_seen = EmbeddingCollector(model, embeddings, users, differentiate)
    collector = _Collector(
        seen, [name for name in layers if name not in embeddings], differentiate, embeddings_seen
    )
    held: list[Batch] = []
    held_tokens = terms = given = 0
    bar = tqdm(total=_length(stream), desc="calibrating", unit="batch", disable=None if progress else True)
    with bar, training_only(model), torch.set_grad_enabled(differentiate):
        with collector.listening():
            for batch in stream:
                given += 1
                if batch.held_out and held_tokens + batch.tokens <= HELD_OUT_TOKENS:
                    held.append(batch)  # its turn comes when the others are known
                    held_tokens += batch.tokens
                    continue
                collector.start(batch)
                terms += _pass(model, batch, loss, generator)
                bar.update()
        factorizations = trial_factorizations(model, collector.stats(tokenizer, terms), users) if held else {}
        validation = HeldOutValidation(model, factorizations, differentiate)
        with validation.listening(), collector.listening():
            for batch in held:
                validation.batch = batch
                collector.start(batch)
                terms += _pass(model, batch, loss, generator)
                bar.update()
    stats = validation.added_to(collector.stats(tokenizer, terms))
    _warn_of_few_batches(given)
    warn_of_few_tokens(stats)
    return stats


def _warn_of_few_batches(batches: int) -> None:
    """Warn where calibration has held out no batch to try its predictions on."""
    if batches < HELD_OUT:
        warn(
            f"Batches: {batches}. With fewer than {HELD_OUT} calibration holds none out, so nothing tells "
            "how far its predictions hold on other data. Give more data, or smaller batches (batch_size=).",
            FewTokensWarning,
        )


def warn_of_few_tokens(stats: Stats) -> None:
    """Warn where predictions from ``stats`` need not hold on other data, of the layer that read the least."""
    full = {name: moments for name, moments in stats.inputs.items() if moments.products.ndim == 2}
    name = min(full, key=lambda name: full[name].weight / len(full[name].total), default=None)
    if name is None:
        return
    tokens, features = int(full[name].weight), len(full[name].total)
    if tokens < TOKENS_PER_FEATURE * features:
        wanted = TOKENS_PER_FEATURE * features
        warn(
            f"{name}: calibrated on {tokens:,} tokens, and reads {features:,} features. With fewer than "
            f"{wanted:,} tokens the predicted loss can be far too low. Give more data.",
            FewTokensWarning,
        )


def _length(stream: Iterable[Batch]) -> int | None:
    return len(stream) if isinstance(stream, Sized) else None


def _pass(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Any, Any], Tensor] | str | None,
    generator: torch.Generator,
) -> int:
    """Run the model forward and, with a loss, backward; return the number of the objective's terms."""
    outputs = batch.call(model)
    if loss is None:
        return 0
    if isinstance(loss, str):
        made = self_supervised(outputs, batch, generator)
    else:
        made = of_loss(loss, outputs, batch)
    if not made.total.requires_grad:
        raise DataError(
            f"Batch {batch.index}: no gradient of the objective reaches a linear layer. Pass loss=None to do "
            "without gradients."
        )
    made.total.backward()  # type: ignore[no-untyped-call]
    return made.terms


class _Collector:
    """Sums moments of inputs and products of gradients, one layer at a time, as the model runs."""

    def __init__(
        self,
        seen: Inspection,
        layers: Collection[str],
        differentiate: bool,
        embeddings_seen: EmbeddingCollector,
    ) -> None:
        self._embeddings_seen = embeddings_seen
        self._fingerprint = seen.fingerprint
        self._layers = {name: seen.model.get_submodule(name) for name in layers}
        self._differentiate = differentiate
        self._inputs: dict[str, _Sums] = {}
        self._gradients: dict[str, _Sums] = {}
        self._sources: dict[str, str] = {}
        self._batch: Batch | None = None
        self._tokens = self._digest = 0
        self._seen: dict[tuple[int, int], tuple[Tensor, str]] = {}

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
        if _is_tall(weight):
            with without_autocast():
                rows = wide(rows) @ wide(weight)  # Wᵀ g
        sums = self._gradients.setdefault(name, _Sums(rows))
        if not sums.add(rows):
            raise StatsError(
                f"{name}: the gradient has NaN or infinite values in batch {self._batch.index}. "
                "Load the model in float32, or calibrate with loss=None."
            )

    def stats(self, tokenizer: Any, terms: int) -> Stats:
        """Return the sums so far; layers that were never called are absent."""
        inputs = {}
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
            gradients[name] = Gradients(sums.rows, sums.products().clone(), tall)
        fingerprint = Fingerprint(
            {name: self._fingerprint(name) for name in (*self._layers, *self._embeddings_seen.embeddings)},
            fingerprint_of_tokenizer(tokenizer),
            f"{self._digest:016x}",
        )
        embeddings = self._embeddings_seen.sums()
        return Stats(
            fingerprint, inputs, dict(self._sources), gradients, self._tokens, terms, embeddings=embeddings
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

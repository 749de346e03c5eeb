"""Hooks that sum, as a model runs, what each linear layer reads and how much its output matters.

Hooks on the layers take the inputs; a backward pass of an objective gives the outputs' gradients.
Products are float32 per batch and summed in float64, so the memory does not depend on the amount of data.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.data import Batch
from lowrank.calibration.embeddings import EmbeddingCollector
from lowrank.calibration.moments import Gradients, Moments
from lowrank.calibration.statistics import Stats
from lowrank.errors import StatsError
from lowrank.inspection.contexts import hooked
from lowrank.inspection.fingerprints import Fingerprint, fingerprint_of_tokenizer
from lowrank.inspection.inspection import Inspection
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.metric import products_of_pairs, squares, wide
from lowrank.nn import layer_type_of

WIDEST = 8192
"""Features up to which the products of all pairs are kept (0.5 GB in float64); beyond, each with itself."""


class Collector:
    """Sums moments of inputs and products of gradients, one layer at a time, as the model runs.

    Args:
        seen: The model.
        layers: Names of linear layers and embeddings.
        differentiate: Whether there will be gradients.
        heads: By name of each layer that is tied to an embedding, that embedding.
        draws: How many gradients there are of each batch.

    Attributes:
        tokens: Real tokens seen.
        terms: Terms of the objective, which who runs the model counts.
    """

    def __init__(
        self,
        seen: Inspection,
        layers: Collection[str],
        differentiate: bool,
        heads: Mapping[str, str],
        draws: int = 1,
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
        self._digest = 0
        self._seen: dict[tuple[int, int], tuple[Tensor, str]] = {}
        self.tokens = self.terms = 0
        self.draws = draws

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
        self.tokens += batch.tokens
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
        _check_source(name, self._sources.setdefault(name, key), key, f"in batch {self._batch.index}")
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

    @staticmethod
    def stats(collectors: Sequence[Collector], tokenizer: Any) -> Stats:
        """Return the sums of collectors of one model so far, for one draw of the objective.

        Layers that were never called are absent.
        """
        first = collectors[0]
        sources: dict[str, str] = {}
        for name, key in itertools.chain.from_iterable(each._sources.items() for each in collectors):
            _check_source(name, sources.setdefault(name, key), key, "in a part of the data")
        inputs = {
            name: Moments(rows, total, products)
            for name, (rows, total, products) in _summed([each._inputs for each in collectors])
        }
        gradients = {}
        for name, (rows, _, products) in _summed([each._gradients for each in collectors]):
            layer_type = layer_type_of(first._layers[name])
            assert layer_type is not None
            tall = _is_tall(layer_type.weight(first._layers[name]))
            gradients[name] = Gradients(rows // first.draws, rows, products / first.draws, tall)
        digest = sum(each._digest for each in collectors) % 2**64
        fingerprint = Fingerprint(
            {name: first._fingerprint(name) for name in (*first._layers, *first._embeddings_seen.embeddings)},
            fingerprint_of_tokenizer(tokenizer),
            f"{digest:016x}",
        )
        tokens, terms = (sum(getattr(each, field) for each in collectors) for field in ("tokens", "terms"))
        embeddings = EmbeddingCollector.sums([each._embeddings_seen for each in collectors], first.draws)
        return Stats(fingerprint, inputs, sources, gradients, tokens, terms, embeddings=embeddings)


def _check_source(name: str, known: str, key: str, where: str) -> None:
    if known != key:
        raise StatsError(
            f"{name}: shared its input with {known} at first, but not {where}. A structure that depends on "
            "the data cannot be calibrated."
        )


def _summed(
    parts: Sequence[Mapping[str, _Sums]],
) -> Iterator[tuple[str, tuple[int, Tensor, Tensor]]]:
    """Yield by name the number of rows, their sum, and that of their products, over all parts.

    Raises:
        StatsError: Where the products are not finite.
    """
    for name in dict.fromkeys(itertools.chain.from_iterable(parts)):
        mine = [sums[name] for sums in parts if name in sums]
        products = mine[0].products()
        for sums in mine[1:]:
            products += sums.products()
        if not bool(products.isfinite().all()):
            raise StatsError(
                f"{name}: reads values, or gets gradients, whose squares float64 cannot hold. Scale the "
                "data, or the weights before it."
            )
        yield (
            name,
            (sum(sums.rows for sums in mine), torch.stack([sums.total for sums in mine]).sum(0), products),
        )


def _is_tall(weight: Tensor) -> bool:
    return weight.shape[0] > weight.shape[1]


class _Sums:
    """``Σ x`` and ``Σ x xᵀ`` over rows, in float64; of very wide rows, the diagonal of the latter.

    Rows wait until there are as many as features. Multiplying them is then worth the pass over the
    sums, and they take half of the memory of these; of few rows products are made when
    they are asked for.
    """

    def __init__(self, like: Tensor) -> None:
        size = like.shape[-1]
        self._full = size <= WIDEST
        self.rows = 0
        self.total = torch.zeros(size, dtype=torch.float64, device=like.device)
        self._products: Tensor | None = None
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> bool:
        """Add ``rows (tokens, n)``; return whether all are finite."""
        rows = wide(rows)
        total = rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)
        self.total += total
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= rows.shape[1]:
            self._products = self.products()
            self._waiting.clear()
        return bool(total.isfinite().all())

    def products(self) -> Tensor:
        """Return the products of all rows, a new tensor."""
        size = len(self.total)
        known = self._products
        if not sum(map(len, self._waiting)):
            return (
                self.total.new_zeros((size, size) if self._full else size) if known is None else known.clone()
            )
        rows = torch.cat(self._waiting)
        more = products_of_pairs(rows) if self._full else squares(rows)
        return more if known is None else more.add_(known)

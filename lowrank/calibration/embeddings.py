r"""How the rows of an embedding are used: how often each is read, and how much its elements matter.

A change δE of an embedding E moves what it returns for the token i by its row δe_i, and, of a head tied to
it, the logits of a hidden state h by δE h. To second order that costs the objective

    ½ Σ_i c_i δe_iᵀ G δe_i  +  ½ Σ_i q_i δe_iᵀ H δe_i

with the row's number of reads c_i, ``G = E[ggᵀ]`` of the gradient at the embedding's output, ``q_i = Σ g_i²``
of the gradient at the row's logit, and ``H = E[hhᵀ]``. (Reads and gradients, hidden states and gradients are
taken for independent, as in K-FAC, and logits of different rows too.) Factors can be found for one product
``diag(w) ⊗ M`` only, hence for the one nearest to that sum.

Sources: the nearest Kronecker product: Van Loan & Pitsianis 1993. What rows that were never read count: the
probability of what is unseen, Good 1953.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.data import Batch
from lowrank.errors import StatsError
from lowrank.inspection.contexts import hooked
from lowrank.linalg import Diagonal, Gram, Metric
from lowrank.linalg.metric import products_of_pairs, squares, wide
from lowrank.linalg.shrinkage import shrunk


@dataclass(frozen=True, eq=False)
class EmbeddingStatistics:
    """Sums over the tokens that an embedding was asked for; all float64.

    Args:
        counts: How often each row was read, ``(rows,)``.
        gradients: ``Σ ggᵀ`` of the gradient at the embedding's output, ``(columns, columns)``; ``None``
            without a loss, as the others below.
        head_gradients: ``Σ g²`` of the gradients at the outputs of the heads tied to it, ``(rows,)``;
            ``None`` without such a head.
        head_inputs: ``Σ hhᵀ`` of what these read, ``(columns, columns)``.
        head_tokens: How many that were.
    """

    counts: Tensor
    gradients: Tensor | None = None
    head_gradients: Tensor | None = None
    head_inputs: Tensor | None = None
    head_tokens: int = 0

    @property
    def tokens(self) -> float:
        """How many rows were read in all."""
        return float(self.counts.sum())

    @property
    def pseudo_count(self) -> float:
        """What is added to every row's count, so that unread rows get the share of those read once."""
        never, once = (int((self.counts == number).sum()) for number in (0, 1))
        return min(1.0, (once + 1) / (never + 1))

    @property
    def frequencies(self) -> Tensor:
        """The rows' shares of all reads, smoothed, ``(rows,)``; they add up to 1."""
        smooth = self.counts + self.pseudo_count
        return smooth / smooth.sum()

    def lacks(self, metric: str) -> str | None:
        """Return why the embedding cannot be measured by the metric ``metric``, or ``None``."""
        if not self.tokens:
            return "was not called during calibration"
        if metric == "loss" and self.gradients is None:
            return "no gradient of the loss reached it during calibration"
        return None

    def metric(self, metric: str) -> Metric:
        """Return the metric ``metric`` of the embedding: an error is a mean over tokens."""
        rows = Diagonal(self.frequencies)
        if metric != "loss":
            return Metric(outputs=rows)
        assert self.gradients is not None  # `lacks` tells
        own = shrunk(self.gradients / self.tokens, self.tokens)
        if self.head_gradients is None or self.head_inputs is None:
            return Metric(Gram(own), rows)
        hidden = shrunk(self.head_inputs / max(1, self.head_tokens), self.head_tokens)
        smooth = self.head_gradients + self.head_gradients.sum() * self.pseudo_count / self.tokens
        weights, moment = nearest_product([(self.frequencies, own), (smooth / self.tokens, hidden)])
        return Metric(Gram(moment), Diagonal(weights))

    def __add__(self, other: EmbeddingStatistics) -> EmbeddingStatistics:
        return EmbeddingStatistics(
            self.counts + other.counts,
            _sum(self.gradients, other.gradients),
            _sum(self.head_gradients, other.head_gradients),
            _sum(self.head_inputs, other.head_inputs),
            self.head_tokens + other.head_tokens,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The sums that are there, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one + other if one is not None and other is not None else None


def nearest_product(terms: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return ``w (rows,)`` and ``M (n, n)`` whose ``diag(w) ⊗ M`` is nearest to ``Σ diag(w_i) ⊗ M_i``.

    Nothing becomes negative where the given vectors and the products of the given matrices are not.
    """
    vectors = torch.stack([vector for vector, _ in terms])  # (terms, rows)
    matrices = torch.stack([matrix.flatten() for _, matrix in terms])
    inner = matrices @ matrices.T
    values, found = torch.linalg.eig((vectors @ vectors.T) @ inner)
    mix = found[:, values.real.argmax()].real.abs()  # the leading vector has one sign (Perron)
    moment = (mix @ matrices) / (mix @ inner @ mix).sqrt().clamp(min=torch.finfo(inner.dtype).tiny)
    weights = (matrices @ moment) @ vectors
    return weights, moment.reshape(terms[0][1].shape)


class EmbeddingCollector:
    """Sums, as the model runs, what `EmbeddingStatistics` holds of some embeddings.

    Args:
        model: The model.
        embeddings: Names of the embeddings.
        heads: ``{layer name: embedding name}`` of the heads tied to them.
        differentiate: Whether there will be gradients.

    Attributes:
        embeddings: The embeddings, by name.
        batch: The batch that the model runs on.
    """

    def __init__(
        self, model: nn.Module, embeddings: Collection[str], heads: Mapping[str, str], differentiate: bool
    ) -> None:
        self.embeddings = {name: model.get_submodule(name) for name in embeddings}
        self._heads = {
            model.get_submodule(h): embedding
            for h, embedding in heads.items()
            if embedding in self.embeddings
        }
        self._differentiate = differentiate
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._answered = dict.fromkeys(embeddings, 0)
        for name, embedding in self.embeddings.items():
            weight: Tensor = embedding.weight  # type: ignore[assignment]
            self._sums[name] = {"counts": torch.zeros(len(weight), dtype=torch.float64, device=weight.device)}
        self.batch: Batch | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Attach the hooks, and remove these, and no others, at the end."""
        reading = (
            embedding.register_forward_hook(self._read(name), with_kwargs=True)
            for name, embedding in self.embeddings.items()
        )
        answering = (
            head.register_forward_hook(self._answer(name), with_kwargs=True)
            for head, name in self._heads.items()
        )
        with hooked(itertools.chain(reading, answering)):
            yield

    def _read(self, name: str) -> Callable[..., Tensor]:
        def hook(embedding: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            ids = self._real((args[0] if args else kwargs["input"])[..., None])
            counts = torch.bincount(ids.flatten(), minlength=len(self._sums[name]["counts"]))
            self._add(name, counts=counts.to(torch.float64))
            return self._watched(output, lambda gradient: self._felt(name, gradient))

        return hook

    def _answer(self, name: str) -> Callable[..., Tensor]:
        def hook(head: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            hidden = (args[0] if args else kwargs["input"]).detach()
            return self._watched(output, lambda gradient: self._felt_by_head(name, hidden, gradient))

        return hook

    def _watched(self, output: Tensor, felt: Callable[[Tensor], None]) -> Tensor:
        """Return the output, with ``felt`` to be called with its gradient."""
        if not self._differentiate:
            return output
        if not output.requires_grad:  # nothing before it has a gradient: the graph begins here
            output = output.detach().requires_grad_().clone()
        output.register_hook(felt)  # type: ignore[no-untyped-call]
        return output

    def _felt(self, name: str, gradient: Tensor) -> None:
        self._add(name, gradients=products_of_pairs(wide(self._real(gradient.detach()))))

    def _felt_by_head(self, name: str, hidden: Tensor, gradient: Tensor) -> None:
        rows, read = wide(self._real(gradient.detach())), self._real(hidden)
        self._add(name, head_gradients=squares(rows), head_inputs=products_of_pairs(wide(read)))
        self._answered[name] += len(read)

    def _real(self, values: Tensor) -> Tensor:
        assert self.batch is not None
        return self.batch.real(values)

    def _add(self, name: str, **more: Tensor) -> None:
        sums = self._sums[name]
        for key, value in more.items():
            if not bool(value.isfinite().all()):
                raise StatsError(
                    f"{name}: NaN or infinite values reach the embedding or its head. Load the model in "
                    "float32, "
                    "or calibrate with loss=None."
                )
            sums[key] = sums[key] + value if key in sums else value

    @staticmethod
    def sums(collectors: Sequence[EmbeddingCollector], draws: int) -> dict[str, EmbeddingStatistics]:
        """Return the sums of collectors of one model, those with gradients for one of ``draws``."""
        found: dict[str, EmbeddingStatistics] = {}
        for each in collectors:
            for name, sums in each._sums.items():
                mine = EmbeddingStatistics(
                    **{part: total if part == "counts" else total / draws for part, total in sums.items()},
                    head_tokens=each._answered[name] // draws,
                )
                known = found.get(name)
                found[name] = mine if known is None else known + mine if mine.tokens else known
        return found

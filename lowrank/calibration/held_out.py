"""Try a factorization of every layer on tokens that calibration has not used.

Two things can be wrong with an error that statistics predict. The statistics may fit their tokens and
no others. And the metric ``"loss"`` takes inputs and gradients for independent,
``E[(gᵀ ΔW x)²] ≈ tr(G ΔW C ΔWᵀ)``, which for some layers is far off: the first token of a sequence, on
which attention parks what it does not need, has inputs and gradients unlike any other, and a value
projection can cost ten times the estimate. Both show when a trial factorization meets held-out
tokens. The ratio of what is measured there to what was predicted corrects the layer's curve.

Source: the correction of the eigenvalues in EKFAC (George et al. 2018, arXiv:1806.03884), reduced to
one number per layer, on held-out data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lowrank.calibration.data import Batch
from lowrank.calibration.moments import HeldOutLoss
from lowrank.calibration.statistics import Stats
from lowrank.errors import StatsError
from lowrank.inspection.contexts import hooked
from lowrank.linalg import Metric, error_curve, truncated_svd
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.metric import squares, wide
from lowrank.nn import layer_type_of


@dataclass(frozen=True, eq=False)
class TrialFactorization:
    """One layer's trial factorization: its output is ``L R x + shift``.

    Args:
        left: ``(out, rank)``.
        right: ``(rank, in)``.
        shift: The corrected bias, ``(out,)``.
        predicted: The squared error under the metric, a mean over tokens.
        embedding: The embedding that the layer is tied to, with whose errors its own count.
    """

    left: Tensor
    right: Tensor
    shift: Tensor
    predicted: float
    embedding: str | None = None

    @without_autocast()
    def error(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return ``ΔW x`` of shape ``(…, out)`` from what the dense layer read and returned."""
        inputs = inputs.to(self.right.dtype)  # under autocast it may be another
        return outputs - (inputs @ self.right.T @ self.left.T + self.shift)


class EmbeddingTrial(TrialFactorization):
    """One embedding's trial factorization: it returns rows of ``L R``."""

    @without_autocast()
    def error(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return what is missing from the rows ``(…, columns)`` that the dense embedding returned."""
        return outputs - self.left[inputs] @ self.right


@without_autocast()
def trial_factorizations(
    model: nn.Module, stats: Stats, heads: Mapping[str, str]
) -> dict[str, TrialFactorization]:
    """Factorize every layer at half of its parameters; layers that are too small are left out.

    Of embeddings, ``heads`` says by name which layers are tied to them.
    """
    made: dict[str, TrialFactorization] = {}
    metric_name = stats.best_metric()
    for name in stats.gradients or stats.sources:
        layer = model.get_submodule(name)
        layer_type = layer_type_of(layer)
        assert layer_type is not None
        weight = layer_type.weight(layer).detach()
        rank = weight.numel() // (2 * sum(weight.shape))
        if rank and stats.lacks(name, metric_name) is None:
            metric = stats.metric(name, metric_name, centred=True)
            left, right, *_ = truncated_svd(weight, rank, metric)
            mean = stats.moments(name).mean.to(weight)
            shift = weight @ mean - left @ (right @ mean)
            bias: Tensor | None = layer.bias  # type: ignore[assignment]
            shift = shift if bias is None else shift + bias.detach()
            made[name] = TrialFactorization(
                left, right, shift, error_curve(weight, metric).squared_error(rank)
            )
    for name in stats.embeddings:
        if stats.lacks(name, metric_name) is None:
            made |= _factorizations_of_embedding(
                model, name, heads, stats.metric(name, metric_name, centred=False)
            )
    return made


def _factorizations_of_embedding(
    model: nn.Module, name: str, heads: Mapping[str, str], metric: Metric
) -> dict[str, TrialFactorization]:
    """Factorize an embedding, and try the factors on the layers that are tied to it, too."""
    weight: Tensor = model.get_submodule(name).weight.detach()  # type: ignore[operator,union-attr,assignment]
    rank = weight.numel() // (2 * sum(weight.shape))
    if not rank:
        return {}
    left, right, *_ = truncated_svd(weight, rank, metric)
    nothing = weight.new_zeros(())
    made: dict[str, TrialFactorization] = {}
    made[name] = EmbeddingTrial(left, right, nothing, error_curve(weight, metric).squared_error(rank))
    for head in [head for head, embedding in heads.items() if embedding == name]:
        bias: Tensor | None = model.get_submodule(head).bias  # type: ignore[assignment]
        made[head] = TrialFactorization(left, right, nothing if bias is None else bias.detach(), 0.0, name)
    return made


class HeldOutValidation:
    """Sums the squared errors of the trials over tokens, as the model runs.

    With gradients an error counts as ``(gᵀ ΔW x)²``, else as ``‖ΔW x‖²``.
    """

    def __init__(
        self, model: nn.Module, factorizations: Mapping[str, TrialFactorization], differentiate: bool
    ) -> None:
        self._model, self._factorizations, self._differentiate = model, factorizations, differentiate
        self._measured = dict.fromkeys(factorizations, 0.0)
        self._tokens = dict.fromkeys(factorizations, 0)
        self.batch: Batch | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Attach the hooks, and remove these, and no others, at the end."""
        layers = {name: self._model.get_submodule(name) for name in self._factorizations}
        handles = (
            layer.register_forward_hook(self._hook(name, self._factorizations[name]), with_kwargs=True)
            for name, layer in layers.items()
        )
        with hooked(handles):
            yield

    def _hook(self, name: str, factorization: TrialFactorization) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            inputs = (args[0] if args else kwargs["input"]).detach()
            error = factorization.error(inputs, output.detach())
            if not self._differentiate:
                self._count(name, error)
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._count(name, (wide(error) * wide(gradient)).sum(-1, keepdim=True))
            )
            return output

        return hook

    def _count(self, name: str, errors: Tensor) -> None:
        assert self.batch is not None
        rows = self.batch.real(errors)
        measured = float(squares(rows).sum())
        if not math.isfinite(measured):
            raise StatsError(
                f"{name}: what it returns in batch {self.batch.index}, or its gradient, is NaN or infinite. "
                "It overflows, in half precision perhaps."
            )
        self._measured[name] += measured
        self._tokens[name] += len(rows)

    def added_to(self, stats: Stats) -> Stats:
        """Return the statistics with what was measured, and what was predicted for the same tokens."""
        held: dict[str, HeldOutLoss] = {}
        for name, factorization in self._factorizations.items():
            found = HeldOutLoss(self._measured[name], self._tokens[name] * factorization.predicted)
            owner = factorization.embedding or name
            held[owner] = held[owner] + found if owner in held else found
        return replace(stats, held_out=held)

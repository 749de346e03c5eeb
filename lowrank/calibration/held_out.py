"""Try factorizations of every layer, at every rank, on tokens that they were not fitted to.

Three things can be wrong with an error that statistics predict. The statistics may fit their tokens and
no others: with fewer tokens than features they do so perfectly. The metric ``"loss"`` takes inputs and
gradients for independent, ``E[(gᵀ ΔW x)²] ≈ tr(G ΔW C ΔWᵀ)``, which for some layers is far off: the first
token of a sequence, on which attention parks what it does not need, has inputs and gradients unlike any
other. And it takes tokens for independent, though the errors of one sample's tokens add up before they are
squared: what moves the objective's term is ``Σ_t g_tᵀ ΔW x_t``.

All three show where a trial meets a part of the data that the others have not seen. The components of a
factorization are those of all smaller ones too, so one trial tells the error at every rank.

Source: cross-validation (Stone 1974) of the eigenvalues' correction in EKFAC (George et al. 2018,
arXiv:1806.03884).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.data import Batch
from lowrank.calibration.held_out_errors import HeldOutErrors
from lowrank.calibration.statistics import Stats
from lowrank.errors import StatsError
from lowrank.inspection.contexts import hooked
from lowrank.linalg import Metric
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.metric import wide
from lowrank.linalg.svd import components
from lowrank.nn import layer_type_of


@dataclass(frozen=True, eq=False)
class TrialFactorization:
    """One layer's factors of full rank, of which the first k components are the best of rank k.

    Args:
        left: ``(out, ranks)``.
        right: ``(ranks, in)``.
        mean: What the layer reads on average, ``(in,)``, if a bias takes up the mean of the error.
        predicted: The squared error at every rank under the metric, a mean over tokens, ``(ranks + 1,)``.
        embedding: The embedding that the layer is tied to, with whose errors its own count.
    """

    left: Tensor
    right: Tensor
    mean: Tensor | None
    predicted: Tensor
    embedding: str | None = None

    @property
    def outputs(self) -> Tensor:
        """Directions of the components in the output, ``(out, ranks)``."""
        return self.left

    def amounts(self, inputs: Tensor) -> Tensor:
        """Return how much there is of each component, ``(…, ranks)``."""
        inputs = inputs.to(self.right.dtype)  # under autocast it may be another
        return (inputs if self.mean is None else inputs - self.mean) @ self.right.T

    def whole(self, layer: nn.Module, outputs: Tensor) -> Tensor:
        """Return what the components add up to at full rank, from what the dense layer returned."""
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        outputs = outputs if bias is None else outputs - bias.detach()
        if self.mean is None:
            return outputs
        layer_type = layer_type_of(layer)
        assert layer_type is not None
        return outputs - layer_type.weight(layer).detach() @ self.mean


class EmbeddingTrial(TrialFactorization):
    """One embedding's factors: it returns rows of ``L R``."""

    @property
    def outputs(self) -> Tensor:
        """Directions of the components in the rows, ``(columns, ranks)``."""
        return self.right.T

    def amounts(self, inputs: Tensor) -> Tensor:
        """Return how much of each component the rows ``inputs`` have."""
        return self.left[inputs]

    def whole(self, layer: nn.Module, outputs: Tensor) -> Tensor:
        """Return the rows of the dense embedding."""
        return outputs


@without_autocast()
def trial_factorizations(
    model: nn.Module, stats: Stats, heads: Mapping[str, str]
) -> dict[str, TrialFactorization]:
    """Factorize every layer that can shrink at all.

    Of embeddings, ``heads`` says by name which layers are tied to them.
    """
    made: dict[str, TrialFactorization] = {}
    metric_name = stats.best_metric()
    for name in stats.gradients or stats.sources:
        layer = model.get_submodule(name)
        layer_type = layer_type_of(layer)
        assert layer_type is not None
        weight = layer_type.weight(layer).detach()
        if _can_shrink(weight) and stats.lacks(name, metric_name) is None:
            centred = layer.bias is not None
            factors = _components(weight, stats.metric(name, metric_name, centred))
            mean = stats.moments(name).mean.to(weight) if centred else None
            made[name] = TrialFactorization(factors[0], factors[1], mean, factors[2])
    for name in stats.embeddings:
        if stats.lacks(name, metric_name) is None:
            made |= _factorizations_of_embedding(
                model, name, heads, stats.metric(name, metric_name, centred=False)
            )
    return made


def _can_shrink(weight: Tensor) -> bool:
    return weight.numel() >= 2 * sum(weight.shape)


def _components(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of full rank, and the squared error of their first k components for every k."""
    left, right, squares = components(weight, metric)
    return left, right, torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]).cpu()


def _factorizations_of_embedding(
    model: nn.Module, name: str, heads: Mapping[str, str], metric: Metric
) -> dict[str, TrialFactorization]:
    """Factorize an embedding, and try the factors on the layers that are tied to it, too."""
    weight: Tensor = model.get_submodule(name).weight.detach()  # type: ignore[operator,union-attr,assignment]
    if not _can_shrink(weight):
        return {}
    left, right, predicted = _components(weight, metric)
    made: dict[str, TrialFactorization] = {name: EmbeddingTrial(left, right, None, predicted)}
    for head in [head for head, embedding in heads.items() if embedding == name]:
        made[head] = TrialFactorization(left, right, None, torch.zeros_like(predicted), name)
    return made


class HeldOutValidation:
    """Sums the squared errors of the trials at every rank, as the model runs.

    Of each batch there are ``draws`` of the objective, so that it gets as many gradients, whose mean counts.
    With gradients the error of a sample counts as ``(Σ_t g_tᵀ ΔW x_t)²``, else that of a
    token as ``‖ΔW x‖²``.
    """

    def __init__(
        self,
        model: nn.Module,
        factorizations: Mapping[str, TrialFactorization],
        differentiate: bool,
        draws: int,
    ) -> None:
        self._model, self._factorizations, self._differentiate = model, factorizations, differentiate
        self._draws = draws
        self._measured: dict[str, Tensor | float] = dict.fromkeys(factorizations, 0.0)
        self._joint: dict[str, Tensor | float] = dict.fromkeys(factorizations, 0.0)
        self._tokens, self._samples = dict.fromkeys(factorizations, 0), dict.fromkeys(factorizations, 0)
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
            with without_autocast():
                amounts = wide(factorization.amounts(inputs))
                whole = wide(factorization.whole(layer, output.detach()))
            if not self._differentiate:
                self._count_tokens(name, whole, amounts)
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._count_samples(name, wide(gradient), whole, amounts)
            )
            return output

        return hook

    @without_autocast()
    def _count_samples(self, name: str, gradient: Tensor, whole: Tensor, amounts: Tensor) -> None:
        """Add ``(Σ_t g_tᵀ ΔW x_t)²`` over the samples of a batch, with its gradient."""
        assert self.batch is not None
        felt = gradient @ wide(self._factorizations[name].outputs)
        parts = torch.cat([(gradient * whole).sum(-1, keepdim=True), felt * amounts], dim=-1)
        rows, sums = self.batch.real(parts), self.batch.per_sample(parts)
        self._add(name, _left_over(rows).square(), _left_over(sums).square(), len(sums))

    @without_autocast()
    def _count_tokens(self, name: str, whole: Tensor, amounts: Tensor) -> None:
        """Add ``‖ΔW x‖²`` over the tokens of a batch: components are orthogonal without gradients.

        In float64, since float32 does not hold the squares of all that it holds.
        """
        assert self.batch is not None
        directions = self._factorizations[name].outputs.double()
        whole, amounts = whole.double(), amounts.double()
        explained = 2 * (whole @ directions) * amounts - directions.square().sum(0) * amounts.square()
        parts = torch.cat([whole.square().sum(-1, keepdim=True), explained], dim=-1)
        errors = _left_over(self.batch.real(parts)).clamp(min=0)
        self._add(name, errors, errors, len(errors))

    def _add(self, name: str, errors: Tensor, joint: Tensor, samples: int) -> None:
        assert self.batch is not None
        measured = errors.sum(0)
        if not bool(measured.isfinite().all()):
            raise StatsError(
                f"{name}: what it returns in batch {self.batch.index}, or its gradient, is NaN or infinite. "
                "It overflows, in half precision perhaps."
            )
        self._measured[name] = self._measured[name] + measured
        self._joint[name] = self._joint[name] + joint.sum(0)
        self._tokens[name] += len(errors)
        self._samples[name] += samples

    def found(self) -> dict[str, HeldOutErrors]:
        """Return what was measured by layer, and what was predicted for the same tokens."""
        held: dict[str, HeldOutErrors] = {}
        for name, factorization in self._factorizations.items():
            measured, joint = self._measured[name], self._joint[name]
            if not isinstance(measured, Tensor) or not isinstance(joint, Tensor):
                continue  # never called on these
            owner = factorization.embedding or name
            tokens, samples = self._tokens[name] // self._draws, self._samples[name] // self._draws
            predicted = tokens * factorization.predicted
            if owner != name:
                tokens = samples = 0  # the embedding has counted them
            errors = HeldOutErrors(
                tokens, samples, measured.cpu() / self._draws, joint.cpu() / self._draws, predicted
            )
            held[owner] = held[owner] + errors if owner in held else errors
        return held


def _left_over(parts: Tensor) -> Tensor:
    """Return the first column less the cumulative sum of the others, in float64: what each rank lacks."""
    parts = parts.to(torch.float64)
    return parts[..., :1] - torch.nn.functional.pad(parts[..., 1:].cumsum(-1), (1, 0))

"""Measure what a layer's error really costs, where the product of two metrics only estimates it.

The metric ``"loss"`` takes inputs and gradients for independent: ``E[(gᵀ ΔW x)²] ≈ tr(G ΔW C ΔWᵀ)``.
For some layers that is far off. The first token of a sequence, on which attention parks what it does
not need, has inputs and gradients unlike any other: a value projection can cost ten times the estimate.
Here the left-hand side is summed for a trial factorization of every layer, all in one pass; its ratio
to the right-hand side then corrects the layer's curve when layers are compared.

Source: the correction of the eigenvalues in EKFAC (George et al. 2018, arXiv:1806.03884), reduced to
one number per layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Batch
from lowrank.linalg import spectrum, truncated_svd
from lowrank.nn import kind_of
from lowrank.statistics import Stats


@dataclass(frozen=True, eq=False)
class Trial:
    """One layer's trial factorization: its output is ``L R x + shift``.

    Args:
        left: ``(out, rank)``.
        right: ``(rank, in)``.
        shift: The corrected bias, ``(out,)``.
        predicted: The squared error ``tr(G ΔW C ΔWᵀ)``, a mean over tokens.
    """

    left: Tensor
    right: Tensor
    shift: Tensor
    predicted: float

    def error(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return ``ΔW x`` of shape ``(…, out)`` from what the dense layer read and returned."""
        return outputs - (inputs @ self.right.T @ self.left.T + self.shift)


def trials(model: nn.Module, stats: Stats) -> dict[str, Trial]:
    """Factorize every layer at half of its parameters; layers that are too small are left out."""
    made = {}
    for name in stats.gradients:
        layer = model.get_submodule(name)
        kind = kind_of(layer)
        assert kind is not None
        weight = kind.weight(layer).detach()
        rank = weight.numel() // (2 * sum(weight.shape))
        if rank:
            metric = stats.metric(name, "loss", centred=True)
            left, right, *_ = truncated_svd(weight, rank, metric)
            mean = stats.moments(name).mean.to(weight)
            shift = weight @ mean - left @ (right @ mean)
            bias: Tensor | None = layer.bias  # type: ignore[assignment]
            shift = shift if bias is None else shift + bias.detach()
            made[name] = Trial(left, right, shift, spectrum(weight, metric).squared_error(rank))
    return made


class Curvature:
    """Sums ``(gᵀ ΔW x)²`` over tokens for each trial, as the model runs forward and backward."""

    def __init__(self, model: nn.Module, trials: Mapping[str, Trial]) -> None:
        self._model, self._trials = model, trials
        self._measured = dict.fromkeys(trials, 0.0)
        self._tokens = dict.fromkeys(trials, 0)
        self.batch: Batch | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Attach the hooks, and remove these, and no others, at the end."""
        handles = []
        try:
            for name, trial in self._trials.items():
                layer = self._model.get_submodule(name)
                handles.append(layer.register_forward_hook(self._hook(name, trial), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, trial: Trial) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            inputs = (args[0] if args else kwargs["input"]).detach()
            error = trial.error(inputs, output.detach())
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda gradient: self._felt(name, error, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    def _felt(self, name: str, error: Tensor, gradient: Tensor) -> None:
        assert self.batch is not None
        products = self.batch.real((error * gradient).float().sum(-1, keepdim=True))
        self._measured[name] += float(products.square().sum(dtype=torch.float64))
        self._tokens[name] += len(products)

    def corrected(self, stats: Stats) -> Stats:
        """Return the statistics with what was measured and what was predicted for the same tokens."""
        gradients = dict(stats.gradients)
        for name, trial in self._trials.items():
            predicted = self._tokens[name] * trial.predicted
            gradients[name] = replace(gradients[name], measured=self._measured[name], predicted=predicted)
        return replace(stats, gradients=gradients)

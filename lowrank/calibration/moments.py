"""Sums over tokens, in float64: of what a layer reads, and of its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowrank.linalg import Diagonal, Gram, PulledBack
from lowrank.linalg.shrinkage import shrinkage, shrunk


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens ``x (n,)``, each with a weight.

    Args:
        weight: ``Σ w``.
        total: ``Σ w x``, shape ``(n,)``, float64.
        products: ``Σ w x xᵀ``, shape ``(n, n)``, or its diagonal ``(n,)``, float64.
    """

    weight: float
    total: Tensor
    products: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """``μ = E[x]``, shape ``(n,)``."""
        return self.total / self.weight if self.weight else self.total

    def second(self, centred: bool) -> Tensor:
        """Return ``E[xxᵀ]``, less ``μμᵀ`` if ``centred``; its diagonal if only that is known."""
        second = self.products / self.weight if self.weight else self.products
        if not centred:
            return second
        return second - (self.mean.square() if second.ndim == 1 else torch.outer(self.mean, self.mean))

    def variances(self, centred: bool) -> Tensor:
        """Return the diagonal of `second`, shape ``(n,)``."""
        second = self.second(centred)
        return second if second.ndim == 1 else second.diagonal()

    @cached_property
    def centred(self) -> Diagonal | Gram:
        """The centred second moment as one side of a metric, made once for all layers that share it."""
        return _side(self.second(centred=True), self.weight)

    @cached_property
    def raw(self) -> Diagonal | Gram:
        """The second moment about zero as one side of a metric."""
        return _side(self.second(centred=False), self.weight)

    def of(self, features: Tensor) -> Moments:
        """Return the moments of some features alone; ``features (k,)`` are their indices, int64."""
        products = self.products[features]
        some = products if products.ndim == 1 else products[:, features]
        return Moments(self.weight, self.total[features], some)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.weight + other.weight, self.total + other.total, self.products + other.products)


def _side(matrix: Tensor, samples: float) -> Diagonal | Gram:
    return Diagonal(matrix.clamp(min=0)) if matrix.ndim == 1 else Gram(shrunk(matrix, samples))


@dataclass(frozen=True, eq=False)
class Gradients:
    """Sums over tokens of ``g gᵀ``, with ``g = ∂loss/∂y`` for the layer's output ``y``.

    Args:
        tokens: How many were summed.
        samples: How many gradients these are of: more than one for each token where the objective was drawn
            more than once.
        products: ``Σ ggᵀ (out, out)``, or its diagonal ``(out,)``; or, where ``pulled_back``,
            ``Wᵀ Σ ggᵀ W (in, in)``, which is smaller for ``out > in``.
        pulled_back: Whether the products are seen from the layer's input.
    """

    tokens: int
    samples: int
    products: Tensor
    pulled_back: bool

    @cached_property
    def side(self) -> Diagonal | Gram | PulledBack:
        """``G = E[ggᵀ]`` as the outputs' side of a metric."""
        mean = self.products / max(1, self.tokens)
        if self.pulled_back:
            full = torch.diag(mean) if mean.ndim == 1 else mean
            return PulledBack(full, shrinkage(full, self.samples))
        return _side(mean, self.samples)

    def __add__(self, other: Gradients) -> Gradients:
        return Gradients(
            self.tokens + other.tokens,
            self.samples + other.samples,
            self.products + other.products,
            self.pulled_back,
        )

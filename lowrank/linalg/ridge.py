"""Weighted ridge regression from sums over tokens, towards a matrix that is known already.

    min over L, b of  Σ_t w_t ‖ y_t − L z_t − b ‖²  +  λ W ‖ (L − L₀) D^½ ‖²,    W = Σ w,  D = diag(E[zzᵀ])

Sums of parts of the data add up to those of the whole, and tell the error of any ``L`` and ``b``.

Source: Hoerl & Kennard 1970, with a prior mean; the features' scales set the penalty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank.linalg.matmul import without_autocast


@dataclass
class Regression:
    """Weighted sums over tokens of ``z (features,)`` and ``y (out,)``, in float64."""

    weight: float
    z: Tensor
    y: Tensor
    zz: Tensor
    yz: Tensor
    yy: float

    @classmethod
    def empty(cls, features: int, out: int, device: torch.device) -> Regression:
        """Return the sums over no tokens."""
        make = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(0.0, make(features), make(out), make(features, features), make(out, features), 0.0)

    @without_autocast()
    def add(self, z: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add tokens ``z (tokens, features)``, ``y (tokens, out)`` with ``weight (tokens, 1)``."""
        heavy_z, heavy_y = z * weight, y * weight
        self.weight += float(weight.sum(dtype=torch.float64))
        self.z += heavy_z.sum(0, dtype=torch.float64)
        self.y += heavy_y.sum(0, dtype=torch.float64)
        self.zz += heavy_z.T @ z
        self.yz += heavy_y.T @ z
        self.yy += float((heavy_y * y).sum(dtype=torch.float64))

    def __add__(self, other: Regression) -> Regression:
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Regression(*(mine + its for mine, its in both))

    def error(self, left: Tensor, bias: Tensor) -> float:
        """Return ``Σ w ‖y − L z − b‖²``."""
        explained = 2 * (left * self.yz).sum() - ((left @ self.zz) * left).sum()
        constant = 2 * bias @ (self.y - left @ self.z) - self.weight * bias @ bias
        return self.yy - float(explained) - float(constant)

    def solve(self, ridge: float, prior: Tensor, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """Return ``L (out, features)`` and ``b (out,)``.

        Args:
            ridge: ``λ``; at infinity ``L`` is the prior, and so it is where ``z`` says nothing.
            prior: ``L₀``, float64.
            intercept: Whether there is a ``b``; else it is zero.
        """
        zz, yz = self.zz / self.weight, self.yz / self.weight
        z, y = self.z / self.weight, self.y / self.weight
        if intercept:
            zz, yz = zz - torch.outer(z, z), yz - torch.outer(y, z)
        left = prior
        if ridge < math.inf:
            added = ridge * zz.diagonal().clamp(min=0) + 1e-12 * zz.diagonal().abs().mean()
            root, failed = torch.linalg.cholesky_ex(zz + torch.diag(added))
            if not failed:
                left = prior + torch.cholesky_solve((yz - prior @ zz).T, root).T
        return left, (y - left @ z if intercept else torch.zeros_like(y))

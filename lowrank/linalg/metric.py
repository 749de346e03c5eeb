r"""What "error" means: a metric is a value that weighs the inputs and the outputs of a layer.

Every factorization minimises ``‖G^½ (W − LR) C^½‖_F`` with a matrix ``C (in, in)`` that says how
the inputs lie, and ``G (out, out)`` that says how much each output direction matters. A side of the
metric is an `Identity`, a `Diagonal` or a full `Gram`:

========  ==========  ========  ============================================================
metric    outputs G   inputs C  known as
========  ==========  ========  ============================================================
weight    I           I         truncated SVD (Eckart & Young 1936)
diagonal  I           diagonal  ASVD (Yuan et al. 2023, arXiv:2312.05821), without its exponent
inputs    I           full      DRONE (Chen et al. 2021); SVD-LLM (Wang et al. 2024, arXiv:2403.07378)
loss      full        full      Kronecker-factored Fisher (Martens & Grosse 2015, arXiv:1503.05671)
========  ==========  ========  ============================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lowrank.errors import StatsError
from lowrank.linalg.matmul import product, without_autocast


class Outputs(Protocol):
    """What a factorization asks of the outputs' metric ``G = H Hᵀ``."""

    def pull_back(self, weight: Tensor) -> Tensor:
        """Return ``Wᵀ G W``, shape ``(in, in)``."""
        ...

    def enter(self, weight: Tensor) -> Tensor:
        """Return ``Hᵀ W``, shape ``(out, in)``."""
        ...


class Side(ABC):
    """A positive semi-definite matrix ``C = S Sᵀ`` that weighs either side of a layer."""

    @abstractmethod
    def times(self, matrix: Tensor) -> Tensor:
        """Return ``M C`` for ``M (rows, n)``."""

    @abstractmethod
    def times_root(self, matrix: Tensor) -> Tensor:
        """Return ``M S`` for ``M (rows, n)``: its Frobenius norm is the weighed norm of ``M``."""

    @abstractmethod
    def root_times(self, matrix: Tensor) -> Tensor:
        """Return ``S M`` for ``M (n, columns)``."""

    def pull_back(self, weight: Tensor) -> Tensor:
        """Return ``Wᵀ G W``, shape ``(in, in)``."""
        product = self.times(weight.T) @ weight
        return (product + product.T) / 2

    def enter(self, weight: Tensor) -> Tensor:
        """Return ``Hᵀ W``, shape ``(out, in)``."""
        return self.times_root(weight.T).T


class Identity(Side):
    """Every direction counts the same."""

    def times(self, matrix: Tensor) -> Tensor:
        """Return the matrix as it is."""
        return matrix

    def times_root(self, matrix: Tensor) -> Tensor:
        """Return the matrix as it is."""
        return matrix

    def root_times(self, matrix: Tensor) -> Tensor:
        """Return the matrix as it is."""
        return matrix


@dataclass(frozen=True, eq=False)
class Diagonal(Side):
    """Each feature has a weight of its own: ``values (n,)``, not negative."""

    values: Tensor

    def __post_init__(self) -> None:
        _check_finite(self.values)

    def times(self, matrix: Tensor) -> Tensor:
        """Return ``M C``."""
        return matrix * self.values.to(matrix)

    def times_root(self, matrix: Tensor) -> Tensor:
        """Return ``M C^½``."""
        return matrix * self.values.to(matrix).sqrt()

    def root_times(self, matrix: Tensor) -> Tensor:
        """Return ``C^½ M``."""
        return self.values.to(matrix).sqrt()[:, None] * matrix


@dataclass(frozen=True, eq=False)
class Gram(Side):
    """Directions count by how much of the calibration data lies along them.

    Args:
        matrix: ``(n, n)``, symmetric positive semi-definite up to rounding. It may be singular:
            nothing is inverted.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        _check_finite(self.matrix)

    def times(self, matrix: Tensor) -> Tensor:
        """Return ``M C``."""
        return product(matrix, self.matrix.to(matrix))

    def times_root(self, matrix: Tensor) -> Tensor:
        """Return ``M S``."""
        return product(matrix, self.root.to(matrix))

    def root_times(self, matrix: Tensor) -> Tensor:
        """Return ``S M``."""
        return product(self.root.to(matrix), matrix)

    @cached_property
    def root(self) -> Tensor:
        """The Cholesky factor ``S`` in float64, computed once for all layers that share the matrix.

        Every feature gets 1e-15 of its own variance, so that a large feature does not hide what a large
        weight makes of a small one; and more only as long as rounding makes the factorization fail. Features
        that are always zero stay zero.
        """
        matrix = self.matrix.to(torch.float64)
        matrix = (matrix + matrix.T) / 2
        deviations = matrix.diagonal().clamp(min=0).sqrt()
        unit = torch.where(deviations > 0, powers_of_two(deviations), 0.0)
        alive = unit > 0
        inverse = torch.where(alive, 1 / torch.where(alive, unit, 1.0), 0.0)
        matrix = inverse[:, None] * matrix * inverse
        added = 1e-15
        while True:
            damped = matrix + torch.diag(torch.where(alive, added * matrix.diagonal(), 1.0))
            root, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return unit[:, None] * root
            added *= 10


@dataclass(frozen=True, eq=False)
class PulledBack:
    """The outputs' metric of one weight, seen from its inputs: ``Wᵀ G W (in, in)``.

    Where ``out > in`` this is all that a factorization asks of ``G``, and smaller. It is right for
    that ``W`` only.

    Args:
        matrix: ``Wᵀ G W``.
        shrinkage: The share of it that is replaced by ``Wᵀ W`` of the same trace, as if ``G`` had been
            shrunk towards the identity.
    """

    matrix: Tensor
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(self.matrix)

    def pull_back(self, weight: Tensor) -> Tensor:
        """Return ``Wᵀ G W``, shape ``(in, in)``."""
        matrix = self.matrix.to(weight)
        if not self.shrinkage:
            return matrix
        plain = gram(weight.T)
        trace = plain.trace().clamp(min=torch.finfo(plain.dtype).tiny)
        return (1 - self.shrinkage) * matrix + self.shrinkage * matrix.trace() / trace * plain

    def enter(self, weight: Tensor) -> Tensor:
        """Refuse: the outputs are not known any more."""
        raise ValueError(
            f"a metric pulled back through W has no root for a wide weight {tuple(weight.shape)}"
        )


@dataclass(frozen=True, eq=False)
class Stacked:
    """The outputs of several layers, one below the other: ``G = diag(s₁G₁, s₂G₂, …)``.

    Args:
        sides: ``Gᵢ``, one per layer.
        sizes: Their numbers of outputs.
        scales: ``sᵢ``, how much a squared error of each counts beside those of the others.
    """

    sides: tuple[Outputs, ...]
    sizes: tuple[int, ...]
    scales: tuple[float, ...]

    def pull_back(self, weight: Tensor) -> Tensor:
        """Return ``Σ sᵢ Wᵢᵀ Gᵢ Wᵢ``, shape ``(in, in)``."""
        parts = zip(self.scales, self.sides, self.split(weight), strict=True)
        return torch.stack([scale * side.pull_back(part) for scale, side, part in parts]).sum(0)

    def enter(self, weight: Tensor) -> Tensor:
        """Return ``Hᵀ W``, shape ``(Σ out, in)``."""
        parts = zip(self.scales, self.sides, self.split(weight), strict=True)
        return torch.cat([math.sqrt(scale) * side.enter(part) for scale, side, part in parts])

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Cut ``(Σ out, …)`` into one part per layer."""
        return torch.split(weight, list(self.sizes))


@dataclass(frozen=True, eq=False)
class Metric:
    """How the error of a factorization is measured: ``‖G^½ (W − LR) C^½‖_F``.

    Args:
        inputs: ``C``: `Identity`, `Diagonal` or `Gram`.
        outputs: ``G``: one of these, `PulledBack`, or `Stacked`.
    """

    inputs: Side = field(default_factory=Identity)
    outputs: Outputs = field(default_factory=Identity)

    @property
    def plain(self) -> bool:
        """Whether this is the truncated SVD of the weight itself."""
        return isinstance(self.inputs, Identity) and isinstance(self.outputs, Identity)

    def squared_norm(self, matrix: Tensor) -> float:
        """Return ``‖G^½ M C^½‖²`` of ``M (out, in)``, in float64; refuses a `PulledBack` side."""
        entered = self.outputs.enter(matrix.to(torch.float64))
        return float((self.inputs.times(entered) * entered).sum().clamp(min=0))


def gram(matrix: Tensor, block: int = 192) -> Tensor:
    """Return ``M Mᵀ``, computing the blocks of the lower triangle only.

    Args:
        matrix: Shape ``(rows, columns)``.
        block: Rows computed at a time; at 192 a matrix product is as fast per operation as a large
            one, and five eighths of the products of a 768-row matrix suffice.

    Returns:
        Shape ``(rows, rows)``, in the dtype of ``matrix``.
    """
    rows = matrix.shape[0]
    result = matrix.new_empty(rows, rows)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        result[start:stop, :stop] = product(matrix[start:stop], matrix[:stop].T)
        result[:start, start:stop] = result[start:stop, :start].T
    return result


@without_autocast()
def products_of_pairs(rows: Tensor) -> Tensor:
    """Return ``Σ x xᵀ`` over ``rows (tokens, n)``, at least one, shape ``(n, n)``, float64.

    It is computed in the dtype of the rows, from features that are divided by powers of two, which is exact:
    otherwise the products of features below 1e-19 or above 1e19 leave the range of float32.
    """
    unit = rows.abs().amax(0)
    unit = torch.where(unit > 0, powers_of_two(unit), 1.0)
    scale = unit.to(torch.float64)
    return gram((rows / unit).T).to(torch.float64) * scale[:, None] * scale


def wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 at least: in half precision, products of small gradients would be lost."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squares(rows: Tensor) -> Tensor:
    """Return ``Σ x²`` over ``rows (tokens, n)``, shape ``(n,)``, in float64 but without a copy in float64."""
    return torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()


def powers_of_two(values: Tensor) -> Tensor:
    """Return the largest powers of two that are not above positive ``values``: dividing by them is exact."""
    mantissas, _ = torch.frexp(values)  # in [½, 1)
    return values / (2 * mantissas)


def _check_finite(moments: Tensor) -> None:
    if not bool(moments.isfinite().all()):
        raise StatsError(
            "the moments of inputs or gradients are NaN or infinite: their squares overflow. Calibrate on "
            "smaller values."
        )

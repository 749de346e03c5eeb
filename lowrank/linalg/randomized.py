"""Leading eigenvectors of a symmetric matrix by randomized subspace iteration, with a certificate.

A Chebyshev polynomial of the matrix, applied to a random block, damps every eigenvalue below the
wanted ones (Zhou, Saad, Tiago & Chelikowsky 2006; Halko, Martinsson & Tropp 2011, arXiv:0909.4061).
What distinguishes this one is that it proves how good it is. Split the matrix by the basis ``X``:

    A = [ H  Bᵀ ]   ⪯   [ H + Bᵀ(τI − C)⁻¹B   0  ]
        [ B  C  ]       [ 0                   τI ]

for every τ above the eigenvalues of ``C``, because the Schur complement of the difference is zero.
One Cholesky factorization both checks the condition and yields the inverse, and the sum of the k
largest eigenvalues of the right-hand side bounds what *any* rank-k basis could capture (Ky Fan).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.linalg.eigen import eigh, eigvalsh
from lowrank.linalg.matmul import product

GROWTH = 6.0
"""How far a filter must lift the wanted eigenvalues over the unwanted, as a natural logarithm.

At 6.0 the bound proves 0.1 % for random Gaussian matrices, whose flat spectrum is the hardest.
"""

MORE_GROWTH = 3.0
"""How much further to go each time the bound does not prove the tolerance."""

MAX_PRODUCTS = 48
"""Products with the matrix before giving up; by then the exact solver is faster."""


class Eigenspace(NamedTuple):
    """An orthonormal basis and what is known about it."""

    basis: Tensor  # (n, rank), orthonormal columns
    captured: float  # trace(basisᵀ A basis), at most `bound`
    bound: float  # proven upper bound on what any basis of this size captures; inf if unproven


def oversampled(size: int, rank: int) -> int:
    """Return the width of the random block: about 1.5 ranks, to leave a gap behind the wanted ones.

    It is a multiple of 16, at which matrix products run a tenth faster.
    """
    return min(size, 16 * math.ceil((1.5 * rank + 16) / 16))


def leading_eigenspace(matrix: Tensor, rank: int, tolerance: float, seed: int) -> Eigenspace:
    """Find the leading eigenvectors of ``matrix`` until the uncaptured trace is proven near-minimal.

    The uncaptured trace is ``trace(A) − captured``, the squared error of the factorization. Each
    certificate measures it against the smallest that the bound allows; the block is filtered more
    while the ratio exceeds ``1 + tolerance``.

    Args:
        matrix: Symmetric positive semi-definite, ``(n, n)``, float32 or float64.
        rank: Number of eigenvectors, ``1 <= rank < n``.
        tolerance: Allowed relative excess of the uncaptured trace, positive.
        seed: Seed of the random block; the global generators are not touched.

    Returns:
        The best basis found, with its bound. The caller decides what to do if it falls short.
    """
    generator = torch.Generator(matrix.device).manual_seed(seed)
    shape = len(matrix), oversampled(len(matrix), rank)
    block = torch.randn(shape, generator=generator, device=matrix.device, dtype=matrix.dtype)
    block = _nearly_orthonormal(product(matrix, block))
    trace = float(matrix.diagonal().sum(dtype=torch.float64))
    best = Eigenspace(block[:, :rank], 0.0, float("inf"))
    products, growth, goal = 1, 0.0, GROWTH
    while products < MAX_PRODUCTS:
        image = product(matrix, block)
        if growth >= goal:
            best = _certify(matrix, block, image, rank)
            if trace - best.captured <= (1 + tolerance) * (trace - best.bound):
                break
            goal += MORE_GROWTH
        ritz = eigvalsh(product(block.T, image)).tolist()
        if not ritz[0] > 0:
            break  # numerically rank-deficient: work for the exact solver
        degree, gained = _choose_degree(ritz[0], ritz[-rank], ritz[-1], goal - growth, matrix.dtype)
        block = _orthonormal(_filter(matrix, block, image, ritz[0], degree))
        products, growth = products + degree, growth + gained
    return best


def _choose_degree(
    cut: float, wanted: float, largest: float, growth: float, dtype: torch.dtype
) -> tuple[int, float]:
    """Choose a filter's degree, and tell how far it lifts the ``wanted`` eigenvalue over ``cut``.

    A polynomial of degree d lifts an eigenvalue λ by ``exp(d · arcosh(2λ/cut − 1))``. The largest
    must not outgrow the wanted one by more than the arithmetic resolves, or the latter is lost.
    """
    gap = math.acosh(max(2 * wanted / cut - 1, 1 + 1e-6))
    spread = math.acosh(2 * largest / cut - 1) - gap
    resolved = -math.log(torch.finfo(dtype).eps) - 3  # three powers of e above the rounding
    degree = max(1, math.ceil(growth / gap))
    if spread > 0:
        degree = max(1, min(degree, math.floor(resolved / spread)))
    degree = min(degree, MAX_PRODUCTS)
    return degree, degree * gap


def _orthonormal(block: Tensor) -> Tensor:
    return torch.linalg.qr(block).Q


def _nearly_orthonormal(block: Tensor) -> Tensor:
    """Orthonormalize to a few digits, by a Cholesky factorization, which suffices to choose a filter."""
    triangle, failed = torch.linalg.cholesky_ex(product(block.T, block), upper=True)
    ends = triangle.diagonal().aminmax()
    if failed or not ends.min > 0.03 * ends.max:  # the squares in the product lose twice the digits
        return _orthonormal(block)
    return _solve_right(block, triangle)


def _filter(matrix: Tensor, block: Tensor, image: Tensor, cut: float, degree: int) -> Tensor:
    """Apply the Chebyshev polynomial that is small on ``[0, cut]`` and grows fastest above it."""
    half = cut / 2
    previous, current = block, image / half - block
    for _ in range(degree - 1):
        following = product(matrix, current).mul_(2 / half).sub_(previous)
        previous, current = current, following.sub_(current, alpha=2)
    return current


def _certify(matrix: Tensor, block: Tensor, image: Tensor, rank: int) -> Eigenspace:
    """Take the best ``rank`` directions of the block, and bound what any others could capture.

    In the basis of the Ritz vectors ``H`` is diagonal. With ``(τ − σ)I`` in its place, one Cholesky
    factorization serves for both parts of the bound: it succeeds only if ``S = τI − C`` is positive
    definite, and since it factors

        D = [ σI  −Bᵀ ]         XᵀD⁻¹X = (σI − BᵀS⁻¹B)⁻¹
            [ −B    S ]

    it also yields ``BᵀS⁻¹B``, without ever forming ``B``.
    """
    values, vectors = eigh(product(block.T, image))
    block = product(block, vectors)  # (n, width), Ritz vectors, the wanted ones last
    basis = block[:, -rank:].flip(1)
    captured = float(values[-rank:].sum(dtype=torch.float64))
    shift = float(values[-rank])  # τ
    large = 4 * shift  # σ
    inverse = _quadratic_inverse(matrix, block, values + (large - shift), shift)
    if inverse is None:
        return Eigenspace(basis, captured, float("inf"))
    triangle, failed = torch.linalg.cholesky_ex(inverse)
    if failed:
        return Eigenspace(basis, captured, float("inf"))
    bounding = torch.diag(values + large) - torch.cholesky_inverse(triangle)  # H + BᵀS⁻¹B
    bound = eigvalsh(bounding)[-rank:].clamp(min=shift)
    return Eigenspace(basis, captured, float(bound.sum(dtype=torch.float64)))


def _quadratic_inverse(matrix: Tensor, block: Tensor, added: Tensor, shift: float) -> Tensor | None:
    """Return ``XᵀD⁻¹X`` for ``D = shift·I − A + X diag(added) Xᵀ``; ``None`` unless D is positive definite.

    D is factored in two block columns, and only its lower triangle is formed: a Cholesky
    factorization of this size runs at half the speed of matrix products. Everything is solved from
    the right by upper triangles, which is how they lie in memory.
    """
    half = len(matrix) // 2
    upper, lower, scaled = block[:half], block[half:], block * added
    first = product(scaled[:half], upper.T).sub_(matrix[:half, :half])
    first.diagonal().add_(shift)
    triangle, failed = torch.linalg.cholesky_ex(first, upper=True)
    if failed:
        return None
    across = product(scaled[half:], upper.T).sub_(matrix[half:, :half])
    across = _solve_right(across, triangle)
    second = product(scaled[half:], lower.T).sub_(matrix[half:, half:]).sub_(product(across, across.T))
    second.diagonal().add_(shift)
    solved = _solve_right(upper.T, triangle)
    triangle, failed = torch.linalg.cholesky_ex(second, upper=True)
    if failed:
        return None
    rest = _solve_right(lower.T - product(solved, across.T), triangle)
    return product(solved, solved.T) + product(rest, rest.T)


def _solve_right(matrix: Tensor, triangle: Tensor) -> Tensor:
    """Return ``M T⁻¹`` for an upper triangle ``T``."""
    return torch.linalg.solve_triangular(triangle, matrix, upper=True, left=False)

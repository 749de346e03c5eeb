r"""One basis for layers that read different inputs: adjacent blocks share ``R``, ``Wᵢ ≈ Lᵢ R``.

Each layer has a metric of its own, ``Cᵢ = Sᵢ Sᵢᵀ`` on its inputs and ``Gᵢ`` on its outputs. Given ``R``,
its best ``Lᵢ`` is a regression on ``R x`` that does not depend on ``Gᵢ``,

    Lᵢ = Wᵢ Zᵢ,  Zᵢ = Cᵢ Rᵀ (R Cᵢ Rᵀ)⁻¹,

so that of ``Gᵢ`` only ``Pᵢ = Wᵢᵀ Gᵢ Wᵢ`` counts. With ``Sᵢᵀ Rᵀ = Qᵢ Tᵢ`` what the rows of ``R`` capture of
the squared error is the diagonal of ``Qᵢᵀ Sᵢᵀ Pᵢ Sᵢ Qᵢ``: one QR decomposition gives a layer's error at
every rank.

``R`` begins as the best one for the sums ``Σ sᵢ tr(Cᵢ) Pᵢ`` and ``Σ Cᵢ``: the optimum where all layers read
the same input. Where they do not, alternating pays: all ``Lᵢ`` for this ``R``, then ``R`` for these ``Lᵢ``,
which is the linear system ``Σ sᵢ (Zᵢᵀ Pᵢ Zᵢ) R Cᵢ = Σ sᵢ Zᵢᵀ Pᵢ Cᵢ``.

Source: Basis Sharing (Wang et al. 2025, arXiv:2410.03765) for sharing under summed moments; there ``Lᵢ`` is
that of the sum, and nothing alternates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowrank.linalg.eigen import eigh
from lowrank.linalg.error_curve import ErrorCurve
from lowrank.linalg.metric import Diagonal, Gram, Identity, Metric, PulledBack
from lowrank.linalg.svd import (
    balanced,
    check_factors,
    checked_weight,
    evened,
    measured_error,
    rounding_of,
    with_rounding,
    without_dust,
)

ROUNDS = 2
"""How often ``R`` and all ``Lᵢ`` are fitted in turn.

Squared errors of pairs in all-MiniLM-L6-v2 fall by 3 % for queries, keys and values, 12 % for outputs of
attention and 19 % for those of feed-forward layers; ten rounds more give another 1 to 4 %.
"""

STEPS = 3
"""Steps of conjugate gradients per round; 15 gain less than half a percent over these."""

KNOTS = (1 / 12, 1 / 4)
"""The parts of the largest rank at which `shared_basis_error_curves` measures the gain of alternating."""


class SharedFactors(NamedTuple):
    """``lefts[i] @ right`` and how far it is from each weight."""

    lefts: tuple[Tensor, ...]  # (outᵢ, rank)
    right: Tensor  # (rank, in)
    relative_errors: tuple[float, ...]


class _Member(NamedTuple):
    """What one layer asks of the basis, in float64."""

    second: Tensor  # C (in, in)
    root: Tensor  # S (in, in)
    pulled: Tensor  # s P = s Wᵀ G W (in, in)


class _Fit(NamedTuple):
    """The features ``R x`` of one layer, made orthonormal: ``Sᵀ Rᵀ = Q T``."""

    seen: Tensor  # S Q (in, rank)
    triangle: Tensor  # T (rank, rank)

    def regression(self) -> Tensor:
        """Return ``Z = C Rᵀ (R C Rᵀ)⁻¹``, shape ``(in, rank)``; the least one where rows of ``R`` agree."""
        sizes = torch.linalg.vector_norm(self.triangle, dim=0)
        sizes = torch.where(sizes > 0, sizes, 1.0)
        triangle = (self.triangle / sizes).T
        if bool((triangle.diagonal().abs() > _DEPENDENT).all()):
            return torch.linalg.solve_triangular(triangle, self.seen, upper=False, left=False) / sizes
        return self.seen @ torch.linalg.pinv(triangle, rtol=_DEPENDENT) / sizes

    def captured(self, member: _Member) -> Tensor:
        """Return how much of the squared error each row of ``R`` takes away, ``(rank,)``."""
        return (self.seen * (member.pulled @ self.seen)).sum(0).clamp(min=0)


def shared_basis_error_curves(
    weights: Sequence[Tensor], metrics: Sequence[Metric], scales: Sequence[float], refined: bool = True
) -> tuple[ErrorCurve, ...]:
    """Return the error of each weight at every rank of the shared basis.

    Args:
        weights: Shapes ``(outᵢ, in)``.
        metrics: Of each.
        scales: How much a squared error of each counts beside those of the others; 0 for weights of zeros.
        refined: Whether to count in what alternating gains. It is measured at two ranks (`KNOTS`), and
            interpolated: an estimate, whose sum is good to some 2 %. Without it each error is a bound on
            the one that `shared_basis` reaches with ``none_worse``.

    Returns:
        For each weight a `ErrorCurve` with ``min(Σ out, in) + 1`` errors under its own metric, without its
        scale.

    Raises:
        WeightError: If a weight is not a finite floating-point matrix.
    """
    members = _members(weights, metrics, scales)
    rows, size = sum(len(weight) for weight in weights), weights[0].shape[1]
    basis = _summed_basis(members)
    fits = _fitted(members, basis)
    tails = [_tail(member, fit, min(rows, size)) for member, fit in zip(members, fits, strict=True)]
    if refined:
        largest = rows * size // (rows + size)  # beyond, the factors have more parameters than the weights
        knots = sorted({rank for rank in (round(part * largest) for part in KNOTS) if 0 < rank <= len(basis)})
        found = [_errors(members, *_refined(members, basis[:rank])) for rank in knots]
        for number, tail in enumerate(tails):
            tails[number] = _scaled(tail, knots, [errors[number] for errors in found])
    rounding = rounding_of(weights[0].dtype)
    return tuple(
        ErrorCurve((t / (s or 1.0)).cpu(), rounding=rounding) for t, s in zip(tails, scales, strict=True)
    )


def shared_basis(
    weights: Sequence[Tensor],
    rank: int,
    metrics: Sequence[Metric],
    scales: Sequence[float],
    none_worse: bool = False,
) -> SharedFactors:
    """Factor weights that read different inputs into ``Lᵢ R``, with one ``R (rank, in)``.

    Minimises ``Σ sᵢ ‖Gᵢ^½ (Wᵢ − Lᵢ R) Cᵢ^½‖²`` by alternation.

    Args:
        weights: Shapes ``(outᵢ, in)``, of one dtype and device.
        rank: ``1 <= rank <= in``.
        metrics: Of each.
        scales: As for `shared_basis_error_curves`.
        none_worse: Whether every weight's error must stay within what the basis of the summed moments leaves
            it. Else one may grow a little, where the sum falls.

    Raises:
        WeightError: If a weight is not a finite floating-point matrix.

    Example:
        >>> one, two = torch.eye(4)[:2], torch.eye(4)[2:]
        >>> found = shared_basis([one, two], 4, [Metric(), Metric()], [1.0, 1.0])
        >>> torch.allclose(found.lefts[1] @ found.right, two)
        True
    """
    members = _members(weights, metrics, scales)
    start = _summed_basis(members)[:rank]  # fewer rows where the weights have less rank
    basis, fits = _refined(members, start, none_worse)
    regressions = [fit.regression() for fit in fits]
    lefts = [weight.detach().to(basis) @ z for weight, z in zip(weights, regressions, strict=True)]
    left, right = basis.new_zeros(sum(map(len, lefts)), rank), basis.new_zeros(rank, basis.shape[1])
    left[:, : len(basis)], right[: len(basis)] = torch.cat(lefts), basis
    left, right = evened(left, right)
    dtype = weights[0].dtype
    if dtype == torch.float16:
        left, right = balanced(left, right)
    left, right = left.to(dtype), right.to(dtype).contiguous()
    check_factors(left, right)
    parts = tuple(part.contiguous() for part in torch.split(left, [len(weight) for weight in weights]))
    errors = [
        measured_error(weight.detach().double(), part.double(), right.double(), metric)
        if not isinstance(metric.outputs, PulledBack)
        else _relative_error(member, z, basis, part)
        for weight, part, metric, member, z in zip(weights, parts, metrics, members, regressions, strict=True)
    ]
    return SharedFactors(parts, right, tuple(errors))


def _left_over(member: _Member, regression: Tensor, basis: Tensor) -> float:
    """Return the squared error of ``W Z R``, which ``P`` tells without ``W``."""
    lost = torch.eye(len(regression)).to(basis) - regression @ basis
    return max(0.0, float(((member.pulled @ lost) * (lost @ member.second)).sum()))


def _relative_error(member: _Member, regression: Tensor, basis: Tensor, left: Tensor) -> float:
    """Return the same over ``‖W‖``, with what storing ``left`` adds."""
    total = float(_total(member))
    if not total > 0:
        return 0.0
    return with_rounding(math.sqrt(_left_over(member, regression, basis) / total), left)


def _members(weights: Sequence[Tensor], metrics: Sequence[Metric], scales: Sequence[float]) -> list[_Member]:
    members = []
    for weight, metric, scale in zip(weights, metrics, scales, strict=True):
        checked_weight(weight)
        matrix = weight.detach().to(torch.float64)
        second, root = _second_and_root(metric, matrix)
        members.append(_Member(second, root, (scale or 1.0) * metric.outputs.pull_back(matrix)))
    return members


def _second_and_root(metric: Metric, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``C`` and an invertible ``S``, both ``(in, in)``; tiny ones for a layer that reads constants."""
    side, size = metric.inputs, like.shape[1]
    if isinstance(side, Gram) and bool(side.root.any()):
        return side.matrix.to(like), _invertible(side).to(like)
    if isinstance(side, Diagonal):
        values = side.values.to(like)
    else:
        values = like.new_full((size,), 1.0 if isinstance(side, Identity) else 0.0)
    positive = values.clamp(min=max(_TINY, _RIDGE * float(values.mean())))
    return torch.diag(values), torch.diag(positive.sqrt())


_TINY, _RIDGE, _DEPENDENT = 1e-200, 1e-15, 1e-10


def _invertible(side: Gram) -> Tensor:
    """Return the root of a Gram matrix, in which features that are always zero have a little."""
    diagonal = side.root.diagonal()
    little = (_RIDGE * diagonal.square().mean()).clamp(min=_TINY).sqrt()
    return side.root + torch.diag(torch.where(diagonal > 0, 0.0, little))


def _summed_basis(members: Sequence[_Member]) -> Tensor:
    """Return the best ``R`` under the summed metrics, its rows by importance: as many as the weights' rank.

    ``P`` counts by how much the layer reads, so that larger inputs to a smaller weight are the same.
    """
    root = _invertible(Gram(_sum(member.second for member in members)))
    pulled = _sum(member.second.trace() * member.pulled for member in members)
    values, vectors = eigh(without_dust(root.T @ pulled @ root))
    kept = int((values > torch.finfo(values.dtype).eps * len(values) * values[-1]).sum())
    return vectors.flip(1)[:, :kept].T @ root.T @ pulled  # (kept, in)


def _sum(matrices: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).sum(0)


def _fitted(members: Sequence[_Member], basis: Tensor) -> list[_Fit]:
    fits = []
    for member in members:
        q, triangle = torch.linalg.qr(member.root.T @ basis.T)
        fits.append(_Fit(member.root @ q, triangle))
    return fits


def _total(member: _Member) -> Tensor:
    """Return the squared norm of the weight under its metric."""
    return (member.second * member.pulled).sum().clamp(min=0)


def _tail(member: _Member, fit: _Fit, components: int) -> Tensor:
    """Return the squared error at every rank up to ``components``, ``(components + 1,)``."""
    captured = fit.seen.new_zeros(components)
    captured[: len(fit.triangle)] = fit.captured(member)
    left_over = (_total(member) - captured.sum()).clamp(min=0)
    return torch.cat([captured.flip(0).cumsum(0).flip(0), captured.new_zeros(1)]) + left_over


def _errors(members: Sequence[_Member], basis: Tensor, fits: Sequence[_Fit]) -> list[float]:
    return [_left_over(m, fit.regression(), basis) for fit, m in zip(fits, members, strict=True)]


def _scaled(tail: Tensor, ranks: Sequence[int], errors: Sequence[float]) -> Tensor:
    """Lower ``tail`` to ``errors`` at ``ranks``, and in proportion between and beyond them."""
    parts = [
        error / float(tail[rank]) if tail[rank] > 0 else 1.0
        for rank, error in zip(ranks, errors, strict=True)
    ]
    part = np.interp(np.arange(len(tail)), [0, *ranks], [1.0, *parts])
    return (tail * torch.from_numpy(part).to(tail)).cummin(0).values


def _refined(
    members: Sequence[_Member], basis: Tensor, none_worse: bool = False
) -> tuple[Tensor, list[_Fit]]:
    """Alternate from ``basis`` as long as the sum of the errors falls, or with ``none_worse`` all of them."""
    fits = _fitted(members, basis)
    for _ in range(ROUNDS):
        other = _alternated(members, basis, [fit.regression() for fit in fits])
        found = _fitted(members, other)
        new, old = _errors(members, other, found), _errors(members, basis, fits)
        if not sum(new) < sum(old) or (none_worse and any(a > b for a, b in zip(new, old, strict=True))):
            break
        basis, fits = other, found
    return basis, fits


def _alternated(members: Sequence[_Member], basis: Tensor, regressions: Sequence[Tensor]) -> Tensor:
    """Fit ``R`` to all ``Lᵢ``: conjugate gradients from where it is, preconditioned by the sums."""
    inner = [z.T @ member.pulled @ z for z, member in zip(regressions, members, strict=True)]
    wanted = _sum(z.T @ m.pulled @ m.second for z, m in zip(regressions, members, strict=True))
    both = _sum(inner), _sum(member.second for member in members)
    if not all(bool(each.isfinite().all()) for each in (*both, wanted)):
        return basis  # layers so unlike that float64 cannot weigh them against each other
    left, right = (_invertible(Gram(each)) for each in both)

    def applied(matrix: Tensor) -> Tensor:
        return _sum(a @ matrix @ member.second for a, member in zip(inner, members, strict=True))

    def preconditioned(matrix: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(matrix, left).T, right).T

    residual = wanted - applied(basis)
    step = direction = preconditioned(residual)
    size = (residual * step).sum()
    for _ in range(STEPS):
        along = applied(direction)
        curvature = (direction * along).sum()
        if not (size > 0 and curvature > 0):
            break
        basis, residual = basis + size / curvature * direction, residual - size / curvature * along
        step = preconditioned(residual)
        before, size = size, (residual * step).sum()
        direction = step + size / before * direction
    return basis

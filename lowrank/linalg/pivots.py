"""Pivoted factors: of a product of rank r, r rows determine all others, so that these need not be stored.

A product ``L R`` of shape ``(m, n)`` and rank r is ``P [I; A] B``: ``B (r, n)`` are r of its rows, the
pivots, ``A (m − r, r)`` says how the other rows are combined from them, and ``P`` is the order of the rows.
That is ``r (m + n − r)`` numbers in place of ``r (m + n)``, with nothing lost, and fewer than ``m n`` at
every rank below ``min(m, n)``: pivoted factors have no break-even rank.

Source: PIFA (Zhao et al. 2025, arXiv:2501.19090). Pivots: rows whose submatrix has nearly the largest volume,
found by Gaussian elimination and improved by swaps (Goreinov et al. 2010, "How to find a good submatrix").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import WeightError

LARGEST = 1.5
"""Swaps end when no element of ``A`` is larger, so that rounding errors of the pivots are not blown up."""

SWAPS = 10_000
"""More than are ever needed: each swap makes a determinant larger by `LARGEST` at least."""


RESOLVING = (torch.float32, torch.float64)
"""Dtypes whose rounding errors may be multiplied by ‖A‖, which is 20 to 100 for trained layers."""


class Pivots(NamedTuple):
    """A product as pivoted factors.

    Attributes:
        order: For each row of the product its place in ``[B; A B]``, ``(m,)``, int32: a permutation.
        rest: ``A (m − r, r)``.
        rows: ``B (r, n)``, the pivot rows.
    """

    order: Tensor
    rest: Tensor
    rows: Tensor


def pivots(left: Tensor, right: Tensor) -> Pivots:
    """Return the pivoted factors of ``left (m, r) @ right (r, n)``, in the dtype of ``left``.

    Computed in float64. Factors may be rank-deficient, or zero: some rows of ``B`` depend on others then.

    Raises:
        WeightError: If a factor is not finite, or r is above m.
    """
    rank = left.shape[1]
    if rank > len(left):
        raise WeightError(
            f"factors {tuple(left.shape)} and {tuple(right.shape)}: the rank is above the rows."
        )
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise WeightError("a factor has NaN or infinite elements.")
    basis = torch.linalg.qr(left.double()).Q  # any basis of the columns has the same A, dependent ones too
    chosen, rest = _chosen(basis)
    others = torch.ones(len(left), dtype=torch.bool, device=left.device)
    others[chosen] = False
    remaining = others.nonzero()[:, 0]
    order = torch.empty(len(left), dtype=torch.int32, device=left.device)
    order[torch.cat([chosen, remaining])] = torch.arange(len(left), dtype=torch.int32, device=left.device)
    rows = left.double()[chosen] @ right.double()
    return Pivots(order, rest[remaining].to(left.dtype).contiguous(), rows.to(left.dtype).contiguous())


def product_of(found: Pivots) -> Tensor:
    """Return ``P [I; A] B``, ``(m, n)``."""
    return torch.cat([found.rows, found.rest @ found.rows])[found.order.long()]


def _chosen(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows of an orthonormal ``basis (m, r)`` are pivots, and how all rows combine them."""
    permutation = torch.linalg.lu(basis)[0]  # (m, m); column i says which row is the i-th pivot
    chosen = permutation.argmax(0)[: basis.shape[1]]
    combined = _combined(basis, chosen)
    for _ in range(SWAPS):
        row, column = divmod(int(combined.abs().argmax()), combined.shape[1])
        pivot = combined[row, column].clone()
        if pivot.abs() <= LARGEST:
            break
        change = combined[row].clone()
        change[column] -= 1
        combined -= torch.outer(combined[:, column], change / pivot)
        chosen[column] = row
    return chosen, _combined(basis, chosen)  # anew: each swap adds a rounding error


def _combined(basis: Tensor, chosen: Tensor) -> Tensor:
    """Return ``X (m, r)`` with ``X @ basis[chosen] = basis``."""
    return torch.linalg.solve(basis[chosen], basis, left=False)

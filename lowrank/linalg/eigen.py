"""Eigenvalues of symmetric matrices, also where LAPACK's fastest driver does not converge.

It fails for about one finite matrix in 100,000, on no property of the matrix that could be told before: the
same matrix in other rounding, such as a third of it, succeeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]

_FACTORS = (1 / 3, 1 / 7, 1 / 11)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors as columns, of a finite symmetric ``matrix``."""
    values, vectors = _tried(torch.linalg.eigh, matrix)
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of a finite symmetric ``matrix``, ascending."""
    values: Tensor = _tried(lambda scaled: (torch.linalg.eigvalsh(scaled), None), matrix)[0]
    return values


def _tried(solve: Callable[[Tensor], Any], matrix: Tensor) -> tuple[Tensor, Any]:
    try:
        values, vectors = solve(matrix)
        return values, vectors
    except LinAlgError:
        for factor in _FACTORS:
            try:
                values, vectors = solve(matrix.double() * factor)
            except LinAlgError:
                continue
            return (values / factor).to(matrix.dtype), None if vectors is None else vectors.to(matrix.dtype)
        raise

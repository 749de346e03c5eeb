"""Eigenvalues, also where LAPACK's fastest driver does not converge."""

import pytest
import torch
from random_tensors import gaussian64


def test_eigenvalues_are_found_where_lapack_does_not_converge(monkeypatch):
    """As happens to one finite matrix in 100,000, for one driver and one rounding."""
    import lowrank.linalg.eigen as eigen

    matrix, solve, calls, failing = gaussian64(8, 8), torch.linalg.eigh, [], 2
    matrix = matrix @ matrix.T

    def stubborn(given):
        calls.append(1)
        if len(calls) <= failing:
            raise eigen.LinAlgError("did not converge")
        return solve(given)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    values, vectors = eigen.eigh(matrix)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix)
    failing = 100
    with pytest.raises(eigen.LinAlgError, match="converge"):
        eigen.eigh(matrix)

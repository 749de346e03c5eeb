"""The certificate: a bound that is no smaller than what the best basis captures, on any spectrum."""

import math

import pytest
import torch
from closeness import SUMS64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowrank.linalg.randomized import leading_eigenspace, oversampled

KINDS = ["power-law", "exponential", "step", "outlier", "flat"]


def eigenvalues(kind: str, size: int, steepness: float) -> Tensor:
    index = torch.arange(1, size + 1, dtype=torch.float64)
    return {
        "power-law": index ** -(0.2 + 4 * steepness),
        "exponential": torch.exp(-(index - 1) * (0.01 + steepness / 2)),
        "step": torch.where(index <= max(1, size // 3), 1.0, 0.9 * (1 - steepness) + 1e-6),
        "outlier": torch.where(index == 1, 1.0, 0.9 * (1 - steepness) + 1e-6),
        "flat": torch.ones(size, dtype=torch.float64),
    }[kind]


def symmetric(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = basis * values @ basis.T
    return (matrix + matrix.T) / 2


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(10, 120),
    steepness=st.floats(0, 1),
    share=st.floats(0, 0.99),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_bound_is_never_below_what_the_best_basis_captures(kind, size, steepness, share, double, seed):
    dtype = torch.float64 if double else torch.float32
    matrix = symmetric(eigenvalues(kind, size, steepness), seed).to(dtype)
    rank = min(size - 1, 1 + int(share * size))
    found = leading_eigenspace(matrix, rank, tolerance=2e-3, seed=seed)

    values = torch.linalg.eigvalsh(matrix.double())
    best, trace = float(values[-rank:].sum()), float(values.sum())
    slack = size * torch.finfo(dtype).eps * trace  # rounding of the products with the matrix
    assert found.bound >= best - slack
    assert found.captured <= found.bound + slack
    assert found.captured <= best + slack


@given(
    kind=st.sampled_from(KINDS), steepness=st.floats(0, 1), rank=st.integers(1, 30), seed=st.integers(0, 99)
)
def test_the_basis_is_orthonormal_and_captures_what_it_says(kind, steepness, rank, seed):
    matrix = symmetric(eigenvalues(kind, 80, steepness), seed)
    found = leading_eigenspace(matrix, rank, tolerance=2e-3, seed=seed)
    assert found.basis.shape == (80, rank)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(rank, dtype=torch.float64))
    if math.isfinite(found.bound):
        captured = float((found.basis.T @ matrix @ found.basis).trace())
        assert found.captured == pytest.approx(captured, rel=SUMS64)


@pytest.mark.parametrize(
    ("kind", "rank"), [("power-law", 20), ("exponential", 20), ("step", 50), ("outlier", 1)], ids=str
)
def test_the_bound_is_tight_enough_to_prove_a_tenth_of_a_percent(kind, rank):
    matrix = symmetric(eigenvalues(kind, 150, 0.02), seed=0)
    trace = float(matrix.trace())
    found = leading_eigenspace(matrix, rank, tolerance=2e-3, seed=0)
    assert trace - found.captured <= 1.002 * (trace - found.bound)


def test_a_smaller_tolerance_buys_a_smaller_error():
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(200, 200, generator=generator, dtype=torch.float64)
    matrix = gaussian @ gaussian.T
    loose, tight = (leading_eigenspace(matrix, 20, tolerance=t, seed=0) for t in (1e-2, 1e-7))
    best = float(torch.linalg.eigvalsh(matrix)[-20:].sum())
    assert best - tight.captured < (best - loose.captured) / 100
    assert tight.bound - best < (loose.bound - best) / 100


def test_a_matrix_of_zeros_proves_nothing_and_does_not_fail():
    assert leading_eigenspace(torch.zeros(30, 30), 3, tolerance=1e-3, seed=0).bound == math.inf


@pytest.mark.parametrize(("size", "rank"), [(10, 9), (100, 1), (100, 99), (1000, 100)], ids=str)
def test_the_block_is_wider_than_the_rank_and_fits_the_matrix(size, rank):
    assert rank < oversampled(size, rank) <= size

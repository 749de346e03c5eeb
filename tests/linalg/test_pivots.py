"""Pivoted factors: the same product, fewer numbers, and no pivot that blows up errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.errors import WeightError
from lowrank.linalg.pivots import LARGEST, pivots, product_of


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    fewer=st.integers(0, 29),
    decay=st.floats(0, 12),
    seed=st.integers(0, 999),
)
@settings(deadline=None)
def test_the_product_stays_and_numbers_are_saved(rows, columns, fewer, decay, seed):
    rank = max(1, min(rows, columns) - fewer)
    left = gaussian(rows, rank, seed=seed) * torch.logspace(0, -decay, rank, dtype=torch.float64)
    right = gaussian(rank, columns, seed=seed + 1)
    found = pivots(left, right)
    product = left @ right
    # A is at most LARGEST per element, so an error of the pivots grows by less than rank · LARGEST.
    assert (product_of(found) - product).norm() <= 1e-12 * rank * product.norm()
    assert found.rest.numel() + found.rows.numel() == rank * (rows + columns - rank)
    assert sorted(found.order.tolist()) == list(range(rows))
    assert not found.rest.numel() or float(found.rest.abs().max()) <= LARGEST * (1 + 1e-6)


@given(rank=st.integers(1, 8), true=st.integers(0, 8), seed=st.integers(0, 99))
@settings(deadline=None)
def test_dependent_and_zero_factors_have_pivots_too(rank, true, seed):
    left = gaussian(20, min(true, rank), seed=seed) @ gaussian(min(true, rank), rank, seed=seed + 1)
    right = gaussian(rank, 15, seed=seed + 2)
    found = pivots(left, right)
    torch.testing.assert_close(product_of(found), left @ right, rtol=0, atol=1e-11)
    assert float(found.rest.abs().max()) <= LARGEST * (1 + 1e-6)


def test_pivot_rows_are_rows_of_the_product_to_the_bit_of_their_dtype():
    left, right = gaussian(50, 12).float(), gaussian(12, 40, seed=1).float()
    found = pivots(left, right)
    exact = (left.double() @ right.double())[found.order.argsort()[:12].long()]
    assert torch.equal(found.rows, exact.float())
    assert found.rest.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(value):
    left = gaussian(6, 2)
    left[3, 1] = value
    with pytest.raises(WeightError, match="NaN or infinite"):
        pivots(left, gaussian(2, 5))


def test_more_pivots_than_rows_are_refused():
    with pytest.raises(WeightError, match="the rank is above the rows"):
        pivots(gaussian(2, 3), gaussian(3, 5))

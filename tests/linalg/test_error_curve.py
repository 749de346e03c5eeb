"""`error_curve` against all singular values of `torch.linalg.svdvals`, at every rank."""

import math

import pytest
import torch
from closeness import ROOTS64, SUMS64
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import gaussian64

from lowrank.errors import WeightError
from lowrank.linalg import Gram, Metric, error_curve, truncated_svd

SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16), "row": (1, 9), "column": (9, 1)}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_error_at_every_rank_is_that_of_all_singular_values(shape, dtype):
    weight = gaussian64(*shape).to(dtype)
    values = torch.linalg.svdvals(weight.double())
    measured = error_curve(weight)
    assert measured.tail.shape == (min(shape) + 1,)
    assert measured.tail.dtype == torch.float64
    for rank in range(min(shape) + 1):
        expected = float(values[rank:].norm() / values.norm())
        # The Gram matrix is formed in float64: an error below the root of its rounding is not seen.
        tail = float((measured.tail[rank] / measured.tail[0]).sqrt())
        assert tail == pytest.approx(expected, rel=1e-6, abs=1e-7)
        if dtype in (torch.float64, torch.float32):  # no rounding worth telling
            assert measured.relative_error(rank) == tail
    torch.testing.assert_close(measured.singular_values, values, rtol=1e-6, atol=1e-7 * float(values[0]))


@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-30], ids=["huge", "one", "tiny"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_tail_at_rank_zero_is_the_squared_norm(shape, scale):
    weight = (gaussian64(*shape) * scale).float()
    norm = float(torch.linalg.matrix_norm(weight.double()))
    found = error_curve(weight)
    assert float(found.tail[0].sqrt()) * found.scale == pytest.approx(norm, rel=SUMS64, abs=0)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    bound=st.floats(0.01, 0.99),
    decay=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_smallest_rank_meets_the_bound_and_one_less_does_not(rows, columns, bound, decay, seed):
    measured = error_curve(gaussian64(rows, columns, seed=seed) * torch.arange(1.0, columns + 1) ** -decay)
    rank = measured.smallest_rank(bound)
    assert 1 <= rank <= min(rows, columns)
    assert measured.relative_error(rank) <= bound * (1 + 1e-12)
    if rank > 1:
        assert measured.relative_error(rank - 1) > bound * (1 - 1e-12)


@given(rows=st.integers(2, 30), columns=st.integers(2, 30), seed=st.integers(0, 99), data=st.data())
def test_truncated_svd_has_the_error_that_the_spectrum_predicts(rows, columns, seed, data):
    weight = gaussian64(rows, columns, seed=seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    left, right, *_ = truncated_svd(weight, rank)
    error = float((weight - left @ right).norm() / weight.norm())
    assert error_curve(weight).relative_error(rank) == pytest.approx(error, rel=ROOTS64, abs=ROOTS64)


@pytest.mark.parametrize("tokens", [200, 5], ids=["gram-full-rank", "gram-singular"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)], ids=["wide", "tall", "square"])
def test_under_a_metric_it_is_the_spectrum_of_the_outputs(shape, tokens):
    weight, inputs = gaussian64(*shape), gaussian64(tokens, shape[1], seed=1)
    outputs = weight @ inputs.T / math.sqrt(tokens)  # its Gram matrix is W C Wᵀ
    values = torch.linalg.svdvals(outputs)[: min(shape)]
    measured = error_curve(weight, Metric(Gram(inputs.T @ inputs / tokens))).singular_values
    expected = torch.cat([values, values.new_zeros(min(shape) - len(values))])
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-7 * float(values[0]))


def test_a_weight_of_zeros_has_no_error_and_needs_rank_one():
    measured = error_curve(torch.zeros(5, 8))
    assert measured.relative_error(0) == measured.relative_error(3) == 0
    assert measured.smallest_rank(0.1) == 1


def test_a_trainable_weight_stays_out_of_the_graph():
    measured = error_curve(torch.nn.Parameter(gaussian64(5, 8)))
    assert not measured.tail.requires_grad


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((2, 3), math.nan), "6 of 6 values that are NaN or infinite"),
        (torch.ones(3, 4, device="meta"), "meta device and has no data"),
        (torch.ones(4), r"shape \(4,\)"),
        (torch.ones(3, 4, dtype=torch.int8), "int8, not floating point"),
    ],
    ids=["nan", "meta", "vector", "int8"],
)
def test_what_has_no_spectrum_is_refused_with_the_reason(weight, message):
    with pytest.raises(WeightError, match=message):
        error_curve(weight)


def test_a_float64_weight_whose_squares_overflow_has_a_spectrum():
    weight = gaussian64(6, 4) * 1e300
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(error_curve(weight).singular_values, values, rtol=SUMS64, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [40, 100])
def test_the_error_in_half_precision_includes_the_rounding_of_the_factors(matrix_with, dtype, rank):
    """At rank 100 of 100 nothing but rounding is left."""
    weight = matrix_with(torch.logspace(1, -3, 100), 200, 300).to(dtype)
    measured = truncated_svd(weight, rank, solver="exact").relative_error
    # The rounding is estimated as a uniform one; that of the factors at hand is one draw.
    assert error_curve(weight).relative_error(rank) == pytest.approx(measured, rel=0.15)

"""Numbers whose squares, or whose neighbours, are beyond the dtype: the error is the least, and known."""

import math

import pytest
import torch
from closeness import CANCELLED32, FEW32, ROOTS64, SUMS64
from random_tensors import gaussian64
from torch import Tensor

from lowrank.errors import StatsError, WeightError
from lowrank.linalg import (
    Diagonal,
    Gram,
    Metric,
    PulledBack,
    error_curve,
    rotated,
    shared_basis,
    truncated_svd,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = {"wide": (12, 20), "tall": (20, 12)}


def seen_error(weight: Tensor, factors: tuple[Tensor, Tensor], inputs: Tensor) -> float:
    """The relative error on ``inputs (tokens, in)``, in float64 and from the data, not from their moments."""
    left, right, *_ = factors
    lost = weight.double() - left.double() @ right.double()
    return float((lost @ inputs.T).norm() / (weight.double() @ inputs.T).norm())


def least_error(weight: Tensor, rank: int, inputs: Tensor) -> float:
    values = torch.linalg.svdvals(weight.double() @ inputs.T)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [2e-40, 1e-38, 1e-30, 1e30, 1e37])
def test_the_error_of_the_smallest_and_largest_weights_is_the_measured_one(size, shape, dtype):
    weight = (gaussian64(*shape) * size).to(dtype)
    for metric in (Metric(), Metric(Diagonal(torch.ones(shape[1], dtype=torch.float64)))):
        found = truncated_svd(weight, 5, metric)
        eye = torch.eye(shape[1], dtype=torch.float64)
        assert seen_error(weight, found, eye) == pytest.approx(found.relative_error, rel=CANCELLED32)
        rounding = 4 * torch.finfo(dtype).eps
        assert found.relative_error <= least_error(weight, 5, eye) * 1.001 + rounding


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("row", ["one huge row", "all but one tiny"])
def test_one_row_of_another_size_leaves_finite_factors_of_least_error(row, shape):
    weight, inputs = gaussian64(*shape).float(), gaussian64(40, shape[1], seed=1)
    weight[3] *= 1e30
    if row == "all but one tiny":
        weight *= 1e-30
    metric = Metric(Gram(inputs.T @ inputs / 40))
    found = truncated_svd(weight, 5, metric)
    assert found.left.isfinite().all() and found.right.isfinite().all()
    assert seen_error(weight, found, inputs) < 1e-6
    assert found.relative_error < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_large_weights_of_small_features_count_as_much_as_small_ones_of_large_features(shape):
    sizes = torch.logspace(-12, 12, shape[1], dtype=torch.float64)
    weight, inputs = gaussian64(*shape) / sizes, gaussian64(40, shape[1], seed=1) * sizes
    metric = Metric(Gram(inputs.T @ inputs / 40))
    found = truncated_svd(weight, 5, metric)
    assert seen_error(weight, found, inputs) == pytest.approx(least_error(weight, 5, inputs), rel=ROOTS64)
    assert found.relative_error == pytest.approx(least_error(weight, 5, inputs), rel=ROOTS64)
    assert error_curve(weight, metric).relative_error(5) == pytest.approx(least_error(weight, 5, inputs))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_huge_weights_of_features_that_are_always_zero_do_not_matter(dtype):
    weight, inputs = gaussian64(12, 20).to(dtype), gaussian64(40, 20, seed=1)
    weight[:, 4] = 5e4 if dtype == torch.float16 else 1e30
    inputs[:, 4] = 0
    metric = Metric(Gram(inputs.T @ inputs / 40))
    found = truncated_svd(weight, 5, metric)
    best = least_error(weight, 5, inputs)
    assert found.left.isfinite().all() and found.right.isfinite().all()
    # The rounding of bfloat16 factors, 0.4%, adds to the error by its square, and to each of two factors.
    assert seen_error(weight, found, inputs) == pytest.approx(best, rel=0.02)
    assert found.relative_error == pytest.approx(seen_error(weight, found, inputs), rel=CANCELLED32)


def test_a_weight_that_nobody_reads_is_not_what_tells_the_small_ones_apart():
    weight, outputs = torch.ones(8, 1, dtype=torch.bfloat16) * 1e-26, torch.zeros(8, dtype=torch.float64)
    weight[3], outputs[0] = 1e26, 1.0  # the large one's output does not matter
    found = truncated_svd(weight, 1, Metric(outputs=Diagonal(outputs)))
    assert float((found.left @ found.right)[0]) == pytest.approx(1e-26, rel=0.02, abs=0)


def test_what_is_pulled_back_through_an_extreme_weight_has_its_units():
    weight, outputs = gaussian64(20, 12).float() * 1e30, gaussian64(20, 20, seed=1)
    gram = outputs.T @ outputs
    pulled = Metric(outputs=PulledBack(weight.double().T @ gram @ weight.double()))
    one, other = error_curve(weight, pulled), error_curve(weight, Metric(outputs=Gram(gram)))
    for rank in (0, 5):
        assert one.squared_error(rank) == pytest.approx(other.squared_error(rank), rel=SUMS64)


def test_squares_beyond_float64_are_infinite_and_no_overflow_error():
    found = error_curve(gaussian64(6, 4) * 1e300)
    assert found.squared_norm == math.inf
    assert 0 < found.relative_error(2) < 1


def test_zeros_in_half_precision_have_no_rounding_error():
    metric = Metric(outputs=PulledBack(torch.zeros(4, 4)))
    assert truncated_svd(torch.zeros(8, 4, dtype=torch.bfloat16), 2, metric).relative_error == 0


def test_moments_that_are_not_finite_are_refused():
    for side in (Gram, Diagonal, PulledBack):
        with pytest.raises(StatsError, match=r"moments .* are NaN or infinite.*smaller values"):
            side(torch.full((4, 4), math.inf))


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=["wide", "tall"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 5e4], ids=str)
@pytest.mark.parametrize("metric", ["weight", "inputs"])
def test_nothing_between_float16_factors_exceeds_what_the_layer_reads_and_returns(metric, size, shape):
    """Outputs of up to 5e4 that all have one size lie along one component, with eight times that norm."""
    signs = torch.sign(gaussian64(shape[0], seed=1))
    weight = torch.outer(signs, gaussian64(shape[1], seed=2)) + 0.1 * gaussian64(*shape)
    inputs = gaussian64(200, shape[1], seed=3)
    inputs *= size / inputs.abs().max()
    weight = (weight * min(5e4 / float((inputs @ weight.T).abs().max()), 1e4)).half()
    how = Metric() if metric == "weight" else Metric(Gram(inputs.T @ inputs))
    left, right, *_ = truncated_svd(weight, 48, how)
    read, returned = inputs.abs().amax(1), (inputs @ weight.double().T).abs().amax(1)
    between = inputs @ right.double().T
    assert (between.abs().amax(1) <= 1.5 * torch.maximum(read, returned)).all()
    assert (inputs.half() @ right.T).isfinite().all()
    judged = torch.eye(shape[1], dtype=torch.float64) if metric == "weight" else inputs
    assert seen_error(weight, (left, right), judged) <= least_error(weight, 48, judged) * 1.01 + 1e-3


def test_a_basis_of_layers_with_features_that_one_never_sees():
    weights, inputs = [gaussian64(8, 12), gaussian64(9, 12, seed=1)], gaussian64(40, 12, seed=2)
    dead = inputs.clone()
    dead[:, ::3] = 0
    metrics = [Metric(Gram(x.T @ x / 40)) for x in (inputs, dead)]
    found = shared_basis(weights, 6, metrics, [1.0, 1.0])
    for weight, left, seen, error in zip(
        weights, found.lefts, (inputs, dead), found.relative_errors, strict=True
    ):
        assert left.isfinite().all()
        assert seen_error(weight, (left, found.right), seen) == pytest.approx(error, rel=ROOTS64)


def test_factors_beyond_the_range_of_their_dtype_are_refused():
    """What the layer reads lies along (1, 1e-12), and what matters is the second output."""
    seen = torch.tensor([[1.0, 1e-12]], dtype=torch.float64)
    metric = Metric(Gram(seen.T @ seen), Diagonal(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    assert truncated_svd(torch.eye(2), 1, metric).left.isfinite().all()
    with pytest.raises(WeightError, match=r"factors .* beyond what float16 holds .* bfloat16"):
        truncated_svd(torch.eye(2).half(), 1, metric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layers_of_unlike_sizes_and_zeros_share_a_basis_with_true_errors(dtype):
    """The first layer reads two directions only, so that rows of the basis look alike to it."""
    size = 1e3 if dtype == torch.float16 else 1e20
    weights = [
        (gaussian64(8, 12) * size).to(dtype),
        gaussian64(9, 12, seed=1).to(dtype),
        torch.zeros(4, 12, dtype=dtype),
    ]
    seen = [gaussian64(2, 12, seed=2), gaussian64(40, 12, seed=3) * 1e-6, gaussian64(40, 12, seed=4)]
    found = shared_basis(weights, 6, [Metric(Gram(x.T @ x)) for x in seen], [size**-2, 1e12, 0.0])
    for number in (0, 1):
        error = seen_error(weights[number], (found.lefts[number], found.right), seen[number])
        assert found.relative_errors[number] == pytest.approx(error, rel=CANCELLED32, abs=FEW32)
        assert error < (1e-6, 0.9)[number] + 2 * torch.finfo(dtype).eps
    assert found.relative_errors[2] == 0
    assert not found.lefts[2].any()


def test_subnormal_squares_do_not_stop_the_solver():
    """Of sizes from 1 to 1e-45, as what int8 loses of rows of unlike sizes has: LAPACK gave up on those."""
    for seed in range(20):
        sizes = 10 ** (-45 * torch.rand(48, 1, generator=torch.Generator().manual_seed(seed)).double())
        weight = (gaussian64(48, 124, seed=seed) * sizes).float()
        found = truncated_svd(weight, 5)
        error = seen_error(weight, found, torch.eye(124, dtype=torch.float64))
        assert found.relative_error == pytest.approx(error, rel=CANCELLED32, abs=ROOTS64)


def test_float64_factors_beyond_float32_are_brought_within_it():
    """The scales of integers are float32."""
    left, right = torch.ones(4, 1, dtype=torch.float64), torch.full((1, 4), 1e57, dtype=torch.float64)
    columns, rows = rotated(left, right, seed=0)
    assert max(float(columns.abs().max()), float(rows.abs().max())) < torch.finfo(torch.float32).max
    torch.testing.assert_close(columns @ rows, left @ right, rtol=SUMS64, atol=0.0)

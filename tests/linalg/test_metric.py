"""A metric's factorization against slow oracles: whitening by matrix square roots, and linear regression."""

import pytest
import torch
from closeness import ROOTS64
from random_tensors import gaussian64

from lowrank.linalg import Diagonal, Gram, Identity, Metric, PulledBack, Stacked, error_curve, truncated_svd

SHAPES = [(12, 30), (30, 12), (16, 16)]
SHAPE_IDS = ["wide", "tall", "square"]


def moment(size, samples, seed):
    """The second moment of samples whose directions differ by a factor of thirty, or G = I would do."""
    data = gaussian64(samples, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    return data.T @ data / samples


def root(matrix):
    """The symmetric square root: not the one that the library uses."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def squared_error(product, weight, C, G):
    difference = weight - product
    return float(torch.trace(difference.T @ G @ difference @ C))


def optimum(weight, C, G, rank):
    return float(torch.linalg.svdvals(root(G) @ weight @ root(C))[rank:].square().sum())


@pytest.mark.parametrize("samples", [300, 6], ids=["full-rank", "singular"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("sides", ["C", "G", "CG"])
def test_the_error_reaches_the_optimum_of_the_whitened_weight(shape, samples, sides):
    weight = gaussian64(*shape, seed=0)
    C = moment(shape[1], samples, seed=1) if "C" in sides else torch.eye(shape[1], dtype=torch.float64)
    G = moment(shape[0], samples, seed=2) if "G" in sides else torch.eye(shape[0], dtype=torch.float64)
    left, right, error, _ = truncated_svd(weight, 4, Metric(Gram(C), Gram(G)))
    total = squared_error(0, weight, C, G)
    best = optimum(weight, C, G, 4)
    assert squared_error(left @ right, weight, C, G) <= best + 1e-9 * total
    assert error == pytest.approx((best / total) ** 0.5, abs=ROOTS64)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_the_spectrum_is_the_whitened_weights(shape):
    weight, C, G = gaussian64(*shape, seed=0), moment(shape[1], 300, seed=1), moment(shape[0], 300, seed=2)
    expected = torch.linalg.svdvals(root(G) @ weight @ root(C))
    torch.testing.assert_close(error_curve(weight, Metric(Gram(C), Gram(G))).singular_values, expected)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_both_solvers_agree_on_a_large_weight(solver):
    weight, C, G = gaussian64(520, 600, seed=0), moment(600, 900, seed=1), moment(520, 900, seed=2)
    left, right, _, used = truncated_svd(weight, 10, Metric(Gram(C), Gram(G)), solver=solver, tolerance=1e-4)
    assert used == solver
    assert squared_error(left @ right, weight, C, G) <= optimum(weight, C, G, 10) * (1 + 1e-4) ** 2


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_left_is_the_regression_of_the_dense_output_on_the_features(shape):
    weight, C, G = gaussian64(*shape, seed=0), moment(shape[1], 300, seed=1), moment(shape[0], 300, seed=2)
    left, right, *_ = truncated_svd(weight, 4, Metric(Gram(C), Gram(G)))
    regression = weight @ C @ right.T @ torch.linalg.inv(right @ C @ right.T)
    torch.testing.assert_close(left, regression)


def test_what_was_pulled_back_through_a_tall_weight_replaces_the_outputs_metric():
    weight, C, G = gaussian64(30, 12, seed=0), moment(12, 300, seed=1), moment(30, 300, seed=2)
    full = truncated_svd(weight, 4, Metric(Gram(C), Gram(G)))
    pulled = truncated_svd(weight, 4, Metric(Gram(C), PulledBack(weight.T @ G @ weight)))
    torch.testing.assert_close(full.left @ full.right, pulled.left @ pulled.right)


@pytest.mark.parametrize("sizes", [(5, 4), (20, 10)], ids=["wide", "tall"])
def test_stacked_outputs_are_one_block_diagonal_metric(sizes):
    weight, C = gaussian64(sum(sizes), 12, seed=0), moment(12, 300, seed=1)
    blocks = [moment(size, 300, seed=size) for size in sizes]
    stacked = truncated_svd(
        weight, 4, Metric(Gram(C), Stacked(tuple(map(Gram, blocks)), sizes, (1.0,) * len(sizes)))
    )
    whole = truncated_svd(weight, 4, Metric(Gram(C), Gram(torch.block_diag(*blocks))))
    torch.testing.assert_close(stacked.left @ stacked.right, whole.left @ whole.right)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_a_diagonal_is_the_gram_matrix_with_zeros_elsewhere(shape):
    weight = gaussian64(*shape, seed=0)
    inputs, outputs = gaussian64(shape[1], seed=1).square(), gaussian64(shape[0], seed=2).square()
    short = truncated_svd(weight, 4, Metric(Diagonal(inputs), Diagonal(outputs)))
    long = truncated_svd(weight, 4, Metric(Gram(torch.diag(inputs)), Gram(torch.diag(outputs))))
    torch.testing.assert_close(short.left @ short.right, long.left @ long.right)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_equal_weights_give_the_truncated_svd(shape):
    weight = gaussian64(*shape, seed=0)
    plain = truncated_svd(weight, 4)
    same = truncated_svd(weight, 4, Metric(Gram(3 * torch.eye(shape[1])), Identity()))
    torch.testing.assert_close(same.left @ same.right, plain.left @ plain.right)
    assert same.relative_error == pytest.approx(plain.relative_error)


def hard(name, size):
    matrix = moment(size, 300, seed=3)
    if name == "zero":
        matrix.zero_()
    elif name == "dead-channels":
        matrix[::3] = 0
        matrix[:, ::3] = 0
    elif name == "one-huge-channel":
        matrix[1] *= 1e6
        matrix[:, 1] *= 1e6
    elif name == "slightly-indefinite":
        matrix -= 1e-9 * torch.eye(size)
    elif name == "tiny":
        matrix *= 1e-30
    return matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("name", ["zero", "dead-channels", "one-huge-channel", "slightly-indefinite", "tiny"])
def test_hard_statistics_never_fail(name, shape, dtype):
    weight = gaussian64(*shape, seed=0).to(dtype)
    metric = Metric(Gram(hard(name, shape[1])), Gram(hard(name, shape[0])))
    left, right, error, _ = truncated_svd(weight, 6, metric)
    assert left.dtype == right.dtype == dtype
    assert left.isfinite().all()
    assert right.isfinite().all()
    assert 0 <= error <= 1


def test_each_component_has_its_norm_shared_evenly():
    weight, C = gaussian64(30, 12, seed=0), moment(12, 300, seed=1)
    left, right, *_ = truncated_svd(weight, 4, Metric(Gram(C)))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))

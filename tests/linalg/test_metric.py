"""`Inputs(C)`: the optimum of the Cholesky-whitening oracle, and of the outputs where C is singular."""

import pytest
import torch
from torch import Tensor

from lowrank.linalg import Identity, Inputs, truncated_svd
from lowrank.linalg.metric import gram

SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16)}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def anisotropic(tokens: int, features: int) -> Tensor:
    """Inputs whose directions differ by a factor of thirty, or the metric would not matter."""
    rotation = torch.linalg.qr(gaussian(features, features, seed=2)).Q
    scales = torch.logspace(0, -1.5, features, dtype=torch.float64)
    return gaussian(tokens, features, seed=1) * scales @ rotation.T  # (tokens, in)


def best_output_error(weight: Tensor, inputs: Tensor, rank: int) -> float:
    """No rank-``rank`` map gives outputs closer than the truncated SVD of the outputs themselves."""
    values = torch.linalg.svdvals(inputs @ weight.T)
    return float(values[rank:].norm() / values.norm())


def output_error(weight: Tensor, left: Tensor, right: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - left @ right).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_product_is_that_of_cholesky_whitening(shape, rank, solver):
    weight, inputs = gaussian(*shape), anisotropic(300, shape[1])
    second_moment = inputs.T @ inputs / 300
    triangle = torch.linalg.cholesky(second_moment)
    u, s, vt = torch.linalg.svd(weight @ triangle, full_matrices=False)
    whitened = (u[:, :rank] * s[:rank]) @ torch.linalg.solve_triangular(
        triangle, vt[:rank], upper=False, left=False
    )
    left, right, error, _ = truncated_svd(weight, rank, Inputs(second_moment), solver=solver, tolerance=1e-7)
    # The optimum is unique; errors equal to 1e-7 leave the product free by about the root of that.
    torch.testing.assert_close(left @ right, whitened, rtol=0, atol=2e-3 * float(weight.norm()))
    assert error == pytest.approx(
        output_error(weight, whitened, torch.eye(shape[1]).double(), inputs), rel=1e-6
    )


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("tokens", [300, 8], ids=["gram-full-rank", "gram-singular"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_outputs_are_as_close_as_any_of_that_rank(shape, dtype, tokens, solver):
    weight, inputs = gaussian(*shape).to(dtype), anisotropic(tokens, shape[1])
    metric = Inputs((inputs.T @ inputs / tokens).to(dtype))
    for rank in (1, 4, 7):
        left, right, error, _ = truncated_svd(weight, rank, metric, solver=solver)
        measured = output_error(weight.double(), left.double(), right.double(), inputs)
        best = best_output_error(weight.double(), inputs, rank)
        assert best * (1 - 1e-9) <= measured <= best * (1 + 1e-3) + 4 * torch.finfo(dtype).eps
        assert error == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_rank_of_the_inputs_reproduces_the_outputs(shape):
    weight, inputs = gaussian(*shape), anisotropic(8, shape[1])
    left, right, error, _ = truncated_svd(weight, 8, Inputs(inputs.T @ inputs / 8))
    # C is known to 1e-16, so a direction without data counts for at most the root of that.
    assert output_error(weight, left, right, inputs) <= 1e-7
    assert error <= 1e-7


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_beats_the_plain_svd_on_the_outputs(shape):
    weight, inputs = gaussian(*shape), anisotropic(300, shape[1])
    plain = truncated_svd(weight, 4)
    aware = truncated_svd(weight, 4, Inputs(inputs.T @ inputs))
    assert output_error(weight, *aware[:2], inputs) < 0.95 * output_error(weight, *plain[:2], inputs)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inputs_without_a_preferred_direction_are_the_identity(shape):
    weight = gaussian(*shape)
    same = truncated_svd(weight, 4, Inputs(3 * torch.eye(shape[1], dtype=torch.float64)))
    plain = truncated_svd(weight, 4, Identity())
    torch.testing.assert_close(same.left @ same.right, plain.left @ plain.right)
    assert same.relative_error == pytest.approx(plain.relative_error)


@pytest.mark.parametrize("tokens", [300, 8], ids=["gram-full-rank", "gram-singular"])
def test_weigh_and_output_gram_are_two_views_of_one_norm(tokens):
    weight, inputs = gaussian(12, 30), anisotropic(tokens, 30)
    metric = Inputs(inputs.T @ inputs)
    weighed = metric.weigh(weight)
    assert weighed.shape == weight.shape
    torch.testing.assert_close(weighed @ weighed.T, metric.output_gram(weight))
    assert float(weighed.norm()) == pytest.approx(float((inputs @ weight.T).norm()))


@pytest.mark.parametrize(
    ("rows", "block"), [(1, 192), (191, 192), (192, 192), (193, 192), (500, 192), (7, 3)], ids=str
)
def test_gram_is_the_whole_product(rows, block):
    matrix = gaussian(rows, 20)
    product = gram(matrix, block)
    torch.testing.assert_close(product, matrix @ matrix.T, rtol=1e-12, atol=1e-12)

"""One basis for layers that read different inputs: its errors are those of least squares on the data."""

import pytest
import torch
from closeness import CANCELLED32, ROOTS64, SUMS64
from random_tensors import gaussian64

from lowrank.linalg import (
    Diagonal,
    Gram,
    Identity,
    Metric,
    PulledBack,
    Stacked,
    error_curve,
    joint_error_curves,
    shared_basis,
    shared_basis_error_curves,
    truncated_svd,
)
from lowrank.linalg.shared_basis import KNOTS

SHAPES = {
    "wide": [(8, 20), (8, 20)],
    "tall": [(30, 12), (30, 12)],
    "three, unlike": [(16, 16), (9, 16), (20, 16)],
}


def problem(shapes, tokens=200):
    """Weights, what they read `(in, tokens)`, what their outputs count, and their metrics."""
    weights = [gaussian64(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs = [
        gaussian64(n, n, seed=10 + i) @ gaussian64(n, tokens, seed=20 + i) for i, (_, n) in enumerate(shapes)
    ]
    outputs = [gaussian64(m, m, seed=30 + i) for i, (m, _) in enumerate(shapes)]
    metrics = [Metric(Gram(x @ x.T / tokens), Gram(h @ h.T)) for x, h in zip(inputs, outputs, strict=True)]
    return weights, inputs, outputs, metrics


def lost(weight, product, inputs, outputs):
    """The squared error of a factorization on the data, token by token."""
    return float((outputs.T @ (weight - product) @ inputs).square().sum() / inputs.shape[1])


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [200, 7], ids=["full-rank", "singular"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_left_factors_are_least_squares_on_what_each_layer_reads(shapes, tokens, rank):
    weights, inputs, outputs, metrics = problem(shapes, tokens)
    found = shared_basis(weights, rank, metrics, [1.0] * len(weights))
    for weight, x, h, left, error in zip(
        weights, inputs, outputs, found.lefts, found.relative_errors, strict=True
    ):
        features = (found.right @ x).T
        best = torch.linalg.lstsq(features, (weight @ x).T, driver="gelsd").solution.T
        here, oracle = lost(weight, left @ found.right, x, h), lost(weight, best @ found.right, x, h)
        norm = lost(weight, 0 * weight, x, h)
        assert here == pytest.approx(oracle, rel=ROOTS64, abs=SUMS64 * norm)
        assert error**2 == pytest.approx(here / norm, rel=ROOTS64, abs=SUMS64)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_error_lies_between_that_of_a_basis_of_its_own_and_the_bound(shapes):
    weights, _, _, metrics = problem(shapes)
    scales = [0.5 + i for i in range(len(weights))]
    bounds = shared_basis_error_curves(weights, metrics, scales, refined=False)
    for rank in range(1, min(sum(len(w) for w in weights), weights[0].shape[1])):
        found = shared_basis(weights, rank, metrics, scales, none_worse=True)
        for weight, metric, bound, error in zip(weights, metrics, bounds, found.relative_errors, strict=True):
            own = error_curve(weight, metric)
            least = own.relative_error(rank) if rank < len(own.tail) else 0.0
            assert least - 1e-7 <= error <= bound.relative_error(rank) + 1e-7


def test_alternating_gains_and_the_estimate_is_exact_where_it_was_measured():
    weights, _, _, metrics = problem([(24, 24), (24, 24)])
    bounds, estimates = (
        shared_basis_error_curves(weights, metrics, [1.0, 1.0], refined=r) for r in (False, True)
    )
    for part in KNOTS:
        rank = round(part * (48 * 24 // 72))
        found = shared_basis(weights, rank, metrics, [1.0, 1.0]).relative_errors
        assert [each.relative_error(rank) for each in estimates] == pytest.approx(found, rel=SUMS64)
        before = sum(each.squared_error(rank) for each in bounds)
        assert sum(each.squared_error(rank) for each in estimates) < 0.97 * before
    for each in estimates:
        assert bool((each.tail.diff() <= 0).all())


@pytest.mark.parametrize("kind", ["gram", "diagonal", "identity"])
def test_layers_that_read_alike_get_the_joint_optimum(kind):
    weights = [gaussian64(10, 16), gaussian64(14, 16, seed=1)]
    x = gaussian64(16, 16, seed=2)
    side = {"gram": Gram(x @ x.T), "diagonal": Diagonal(x[0].square()), "identity": Identity()}[kind]
    outputs = [Gram(gaussian64(m, m, seed=m) @ gaussian64(m, m, seed=m).T) for m in (10, 14)]
    scales = (2.0, 0.5)
    stacked = Stacked(tuple(outputs), (10, 14), scales)
    metrics = [Metric(side, each) for each in outputs]
    for refined in (True, False):
        for mine, joint in zip(
            shared_basis_error_curves(weights, metrics, scales, refined),
            joint_error_curves(weights, side, stacked),
            strict=True,
        ):
            torch.testing.assert_close(
                mine.tail, joint.tail, rtol=ROOTS64, atol=SUMS64 * float(joint.tail[0])
            )
    found = shared_basis(weights, 5, metrics, scales)
    best = truncated_svd(torch.cat(weights), 5, Metric(side, stacked))
    torch.testing.assert_close(
        torch.cat(found.lefts) @ found.right, best.left @ best.right, rtol=ROOTS64, atol=ROOTS64
    )


def test_a_metric_pulled_back_through_a_tall_weight_is_enough():
    weights, _, _, metrics = problem([(30, 12), (30, 12)])
    seen = [
        Metric(metric.inputs, PulledBack(metric.outputs.pull_back(weight)))
        for weight, metric in zip(weights, metrics, strict=True)
    ]
    one, other = (shared_basis(weights, 4, each, [1.0, 1.0]) for each in (metrics, seen))
    assert one.relative_errors == pytest.approx(other.relative_errors)
    torch.testing.assert_close(one.lefts[1] @ one.right, other.lefts[1] @ other.right)


def test_scale_decides_whose_error_is_small():
    weights, _, _, metrics = problem([(16, 16), (16, 16)])
    first, second = (shared_basis(weights, 4, metrics, scales) for scales in ([100.0, 1.0], [1.0, 100.0]))
    assert first.relative_errors[0] < second.relative_errors[0]
    assert first.relative_errors[1] > second.relative_errors[1]


def test_zeros_constants_and_weights_of_less_rank_are_factored():
    weights, _, _, metrics = problem([(8, 12), (8, 12)])
    zero = shared_basis([0 * weights[0], weights[1]], 8, metrics, [0.0, 1.0])
    assert zero.relative_errors == pytest.approx([0, 0], abs=ROOTS64) and not zero.lefts[0].any()
    assert zero.lefts[1] @ zero.right == pytest.approx(weights[1], abs=ROOTS64)
    nothing = shared_basis([0 * weights[0], 0 * weights[1]], 3, metrics, [0.0, 0.0])
    assert not nothing.lefts[0].any() and nothing.right.shape == (3, 12)
    assert shared_basis_error_curves([0 * weights[0]] * 2, metrics, [0.0, 0.0])[0].relative_error(1) == 0
    constant = [Metric(Gram(torch.zeros(12, 12, dtype=torch.float64)), metrics[0].outputs), metrics[1]]
    found = shared_basis(weights, 4, constant, [1.0, 1.0])
    assert found.right.isfinite().all() and found.lefts[0].isfinite().all()
    assert found.relative_errors[1] == pytest.approx(
        error_curve(weights[1], metrics[1]).relative_error(4), rel=CANCELLED32
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_keeps_its_error(dtype):
    weights, inputs, outputs, metrics = problem([(16, 16), (16, 16)])
    small = [weight.to(dtype) for weight in weights]
    found = shared_basis(small, 6, metrics, [1.0, 1.0])
    assert found.right.dtype == found.lefts[0].dtype == dtype
    for weight, left, x, h, error in zip(
        small, found.lefts, inputs, outputs, found.relative_errors, strict=True
    ):
        here = lost(weight.double(), left.double() @ found.right.double(), x, h)
        assert (here / lost(weight.double(), 0 * weight.double(), x, h)) ** 0.5 == pytest.approx(
            error,
            rel=0.01,  # a bfloat16 has 8 bits: 0.4%
        )

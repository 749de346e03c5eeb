"""Joint factors against the definition: the error of each weight, rank by rank, from its own residual."""

import pytest
import torch
from closeness import ROOTS64, SUMS64
from random_tensors import gaussian64

from lowrank import WeightError
from lowrank.linalg import (
    Gram,
    Identity,
    Metric,
    PulledBack,
    Stacked,
    error_curve,
    joint_error_curves,
    truncated_svd,
)


def moment(size, seed):
    rows = gaussian64(3 * size, size, seed=seed)
    return rows.T @ rows / len(rows)


SIZES = {"wide together": (5, 7), "tall together": (10, 8), "one tall": (20, 3), "three": (6, 6, 6)}


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_each_weights_error_is_that_of_its_residual(sizes, rank):
    weights = [gaussian64(size, 12, seed=size + i) for i, size in enumerate(sizes)]
    C, Gs = moment(12, 100), [moment(size, 200 + i) for i, size in enumerate(sizes)]
    outputs = Stacked(tuple(map(Gram, Gs)), sizes, tuple(0.5 + i for i in range(len(sizes))))
    joint = truncated_svd(torch.cat(weights), rank, Metric(Gram(C), outputs))
    error_curves = joint_error_curves(weights, Gram(C), outputs)
    for weight, G, left, each in zip(weights, Gs, outputs.split(joint.left), error_curves, strict=True):
        lost = weight - left @ joint.right
        measured = torch.trace(G @ lost @ C @ lost.T)
        assert each.squared_error(rank) == pytest.approx(float(measured), rel=ROOTS64)


def test_the_scaled_errors_add_up_to_those_of_the_stack():
    weights, C = [gaussian64(9, 12, seed=0), gaussian64(8, 12, seed=1)], moment(12, 2)
    outputs = Stacked((Identity(), Identity()), (9, 8), (3.0, 0.25))
    first, second = joint_error_curves(weights, Gram(C), outputs)
    whole = error_curve(torch.cat(weights), Metric(Gram(C), outputs))
    torch.testing.assert_close(3.0 * first.tail + 0.25 * second.tail, whole.tail)


def test_metrics_that_were_pulled_back_give_the_same_errors():
    weights, C, Gs = (
        [gaussian64(15, 12, seed=i) for i in (0, 1)],
        moment(12, 2),
        [moment(15, i) for i in (3, 4)],
    )
    scales = (1.0, 2.0)
    pulled = tuple(PulledBack(w.T @ G @ w) for w, G in zip(weights, Gs, strict=True))
    short = joint_error_curves(weights, Gram(C), Stacked(pulled, (15, 15), scales))
    long = joint_error_curves(weights, Gram(C), Stacked(tuple(map(Gram, Gs)), (15, 15), scales))
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a.tail, b.tail)


def test_no_joint_factor_is_better_than_own_ones_and_equal_weights_lose_nothing():
    weight, C = gaussian64(9, 12, seed=0), Gram(moment(12, 2))
    other = gaussian64(9, 12, seed=1)
    alone = error_curve(weight, Metric(C)).tail
    joint, _ = joint_error_curves([weight, other], C, Stacked((Identity(),) * 2, (9, 9), (1.0, 1.0)))
    assert (joint.tail[: len(alone)] >= alone - 1e-9).all()
    twin, _ = joint_error_curves([weight, weight], C, Stacked((Identity(),) * 2, (9, 9), (1.0, 1.0)))
    torch.testing.assert_close(twin.tail[: len(alone)], alone, rtol=SUMS64, atol=SUMS64)


def test_a_weight_that_is_not_finite_is_refused():
    bad = gaussian64(4, 6)
    bad[0, 0] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        joint_error_curves(
            [bad, gaussian64(4, 6)], Identity(), Stacked((Identity(),) * 2, (4, 4), (1.0, 1.0))
        )

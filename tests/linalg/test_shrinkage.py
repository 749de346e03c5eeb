"""Second moments from few samples are brought nearer to the truth, and those from many are left alone."""

import pytest
import torch
from random_tensors import gaussian64
from torch import Tensor

from lowrank.linalg.shrinkage import shrunk

FEATURES = 40


def sampled(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A second moment of ``samples`` draws, and the true one; scales are unlike, and two features alike."""
    mixing = torch.eye(FEATURES, dtype=torch.float64)
    mixing[0, 1] = 1.0
    mixing = mixing * torch.logspace(0, 3, FEATURES, dtype=torch.float64)
    drawn = gaussian64(samples, FEATURES, seed=seed) @ mixing
    return drawn.T @ drawn / samples, mixing.T @ mixing


def distance(found: Tensor, true: Tensor) -> float:
    """The error in units of each feature, or the largest feature would be all that counts."""
    scale = true.diagonal().sqrt()
    return float(((found - true) / scale / scale[:, None]).norm())


@pytest.mark.parametrize("samples", [5, 20, 80])
def test_it_comes_nearer_to_the_truth(samples):
    found, true = sampled(samples)
    assert distance(shrunk(found, samples), true) < distance(found, true)


def test_the_amount_vanishes_as_one_over_the_samples():
    found, true = sampled(20)
    moved = [float((shrunk(true, samples) - true).norm()) for samples in (1e4, 1e6)]
    # The amount is a/(n + 1 − 2/p): 100 times the samples, 1/100 of it, up to the 1 beside n.
    assert moved[0] == pytest.approx(100 * moved[1], rel=1e-3)
    assert moved[1] > 0
    assert torch.equal(shrunk(found, 0), found)


def test_the_diagonal_stays_and_the_result_is_positive_definite():
    found, _ = sampled(5)
    result = shrunk(found, 5)
    torch.testing.assert_close(result.diagonal(), found.diagonal(), rtol=1e-14, atol=0)  # two roundings
    assert torch.linalg.matrix_rank(found, hermitian=True) == 5
    assert torch.linalg.eigvalsh(result).min() > 0


def test_units_of_features_do_not_matter():
    found, _ = sampled(10)
    units = 2.0 ** torch.arange(-20, 20, dtype=torch.float64)  # powers of two: nothing is rounded
    rescaled = shrunk(found * units * units[:, None], 10)
    torch.testing.assert_close(rescaled, shrunk(found, 10) * units * units[:, None], rtol=1e-13, atol=0)


def test_features_that_were_never_seen_stay_zero():
    found, _ = sampled(10)
    found[3], found[:, 3] = 0, 0
    result = shrunk(found, 10)
    assert result.isfinite().all()
    assert not result[3].any() and not result[:, 3].any()

"""Weighted ridge regression from sums, against a least-squares problem of all tokens at once."""

import math

import pytest
import torch
from closeness import SUMS64
from random_tensors import gaussian64
from torch import Tensor

from lowrank.linalg.ridge import Regression

TOKENS, FEATURES, OUT = 200, 6, 4


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    z = gaussian64(TOKENS, FEATURES) * torch.logspace(0, 1, FEATURES, dtype=torch.float64) + 0.5
    y = z @ gaussian64(FEATURES, OUT, seed=1) + gaussian64(TOKENS, OUT, seed=2) - 3.0
    return z, y, gaussian64(TOKENS, 1, seed=3).abs()


def summed(z: Tensor, y: Tensor, weight: Tensor) -> Regression:
    sums = Regression.empty(FEATURES, OUT, torch.device("cpu"))
    sums.add(z, y, weight)
    return sums


def by_least_squares(ridge: float, prior: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """Solve for the factor and the bias at once, the penalty as further rows of the data."""
    z, y, weight = tokens()
    total = weight.sum()
    center, target = (weight * z).sum(0) / total, (weight * y).sum(0) / total
    if not intercept:
        center, target = torch.zeros_like(center), torch.zeros_like(target)
    scales = ((weight * (z - center).square()).sum(0) * ridge).sqrt()
    rows = torch.cat([weight.sqrt() * (z - center), torch.diag(scales)])
    wanted = torch.cat([weight.sqrt() * (y - target), scales[:, None] * prior.T])
    left = torch.linalg.lstsq(rows, wanted).solution.T
    return left, target - left @ center


@pytest.mark.parametrize("intercept", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_the_factor_is_that_of_least_squares_with_the_penalty_as_rows(ridge, intercept):
    prior = gaussian64(OUT, FEATURES, seed=4)
    left, bias = summed(*tokens()).solve(ridge, prior, intercept)
    expected, offset = by_least_squares(ridge, prior, intercept)
    # Besides the rounding of float64, the sums get 1e-12 of their mean diagonal, which is some 30 times the
    # least one here.
    torch.testing.assert_close(left, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(bias, offset, rtol=1e-8, atol=1e-9)


def test_the_error_is_that_of_all_tokens():
    z, y, weight = tokens()
    left, bias = gaussian64(OUT, FEATURES, seed=5), gaussian64(OUT, seed=6)
    exact = float((weight * (y - z @ left.T - bias).square()).sum())
    assert summed(z, y, weight).error(left, bias) == pytest.approx(exact, rel=SUMS64)


def test_sums_of_parts_are_those_of_the_whole():
    z, y, weight = tokens()
    parts = summed(z[:50], y[:50], weight[:50]) + summed(z[50:], y[50:], weight[50:])
    whole = summed(z, y, weight)
    for name, value in vars(whole).items():
        # Another order of 200 additions: their rounding, of a sum whose terms may cancel.
        assert torch.allclose(*(torch.as_tensor(v) for v in (getattr(parts, name), value)), rtol=1e-11)


@pytest.mark.parametrize("intercept", [True, False], ids=["bias", "no-bias"])
def test_an_infinite_ridge_keeps_the_prior(intercept):
    prior = gaussian64(OUT, FEATURES)
    assert torch.equal(summed(*tokens()).solve(math.inf, prior, intercept)[0], prior)


def test_features_that_are_always_zero_keep_the_prior():
    z, y, weight = tokens()
    z[:, 2] = 0
    prior = gaussian64(OUT, FEATURES, seed=4)
    left, _ = summed(z, y, weight).solve(0.1, prior)
    assert torch.equal(left[:, 2], prior[:, 2])

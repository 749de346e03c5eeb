"""Sums over tokens: means, second moments, and gradients pulled back."""

import pytest
import torch
from closeness import FEW32, LAYERS32, SUMS32
from nets import batches, net
from random_tensors import summed

from lowrank import (
    calibrate,
)
from lowrank.errors import StatsError


def test_moments_are_those_of_all_tokens_at_once(mlp, data):
    stats = calibrate(mlp, data)
    everything = torch.cat(data).double()
    moments = stats.moments("0")
    torch.testing.assert_close(moments.mean, everything.mean(0), rtol=SUMS32, atol=FEW32)
    torch.testing.assert_close(
        moments.second(centred=True), torch.cov(everything.T, correction=0), rtol=LAYERS32, atol=SUMS32
    )
    hidden = mlp[1](mlp[0](torch.cat(data))).detach().double()
    torch.testing.assert_close(
        stats.moments("2").second(centred=False), hidden.T @ hidden / len(hidden), rtol=LAYERS32, atol=SUMS32
    )


def test_a_tall_layers_gradients_are_pulled_back_to_its_inputs(mlp, data):
    stats = calibrate(mlp, data, loss=summed)
    assert stats.gradients["0"].pulled_back
    inputs = torch.cat(data).requires_grad_()
    mlp(inputs).square().sum().backward()
    gradient = inputs.grad.double()  # Wᵀ g
    expected = gradient.T @ gradient / len(gradient)
    torch.testing.assert_close(stats.gradients["0"].products / stats.tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e25])
def test_moments_are_those_of_float64_whatever_the_size_of_the_inputs(size):
    data = batches(12, size)
    for batch in data:
        batch[:, 3] *= 1e-8 if size > 1 else 1e8
    stats = calibrate(net(12, 8), data, loss=None)
    rows = torch.cat(data).double()
    found = stats.moments("0").products
    size_of = rows.square().sum(0).sqrt()
    assert ((found - rows.T @ rows).abs() <= 1e-6 * size_of[:, None] * size_of).all()


def test_inputs_whose_squares_float64_cannot_hold_are_refused():
    with pytest.raises(StatsError, match=r"^0: reads values.* whose squares float64 cannot hold"):
        calibrate(net(8, 4, dtype=torch.float64), batches(8, 1e200, torch.float64), loss=None)

"""Weights, inputs and gradients of extreme sizes: the figures are right, or nothing changes."""

import copy
from dataclasses import replace

import pytest
import torch
from closeness import LAYERS32
from nets import batches, gaussian, net
from torch import nn

from lowrank import calibrate, compress, plan
from lowrank.errors import WeightError


def test_gradients_of_any_size_give_the_same_correction_by_held_out_tokens():
    model, found = net(12, 16, 8), []
    for size in (1.0, 1e-12):

        def loss(outputs: torch.Tensor, batch: object, size: float = size) -> torch.Tensor:
            return (size * outputs).square().sum()

        stats = calibrate(model, batches(12), loss=loss)
        found.append([stats.held_out_ratio(name) for name in ("0", "2")])
    assert found[1] == pytest.approx(found[0], rel=LAYERS32)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("loss", [None, "auto"])
@pytest.mark.parametrize("layer", [0, 2])
def test_one_row_at_1e30_leaves_finite_factors(layer, loss, quantize):
    model = net(32, 48, 40, 8)
    with torch.no_grad():
        model[layer].weight[3] = 1e30 * model[layer].weight[3].sign()
    compress(model, rank=4, data=batches(32), loss=loss, quantize=quantize, targets=["0", "2"])
    assert all(
        bool(value.isfinite().all()) for value in model.state_dict().values() if value.is_floating_point()
    )
    assert 0 <= model[layer].relative_error <= 1
    rest = nn.Sequential(*model[: layer + 1])
    assert rest(batches(32)[0]).isfinite().all()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_bias_that_cannot_take_up_the_mean_is_refused_before_anything_changes(quantize):
    model = net(16, 24, 16)
    with torch.no_grad():
        model[0].weight[3], model[2].weight[1] = 1e20, 1e30
    before = copy.deepcopy(model.state_dict())
    data = [batch.abs() for batch in batches(16)][:1]  # too few to hold some out, where outputs overflow
    with pytest.raises(WeightError, match=r"^2: for the mean of what it reads .* torch.float32 cannot hold"):
        compress(model, rank=4, data=data, loss=None, quantize=quantize, targets=["0", "2"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model[0]) is nn.Linear


def test_predictions_are_the_same_in_other_units():
    """Inputs a power of two smaller, and weights larger by as much: the same function, the same plan."""
    figures = []
    for unit in (1.0, 2.0**-70):
        model = net(16, 24, 16)
        model[0].weight.data /= unit
        stats = calibrate(model, batches(16, unit))
        made = plan(model, keep=0.5, stats=stats, targets=["0", "2"], round_to=1)
        figures.append([(x.rank, x.relative_error, x.held_out_error, x.loss_increase) for x in made])
    for one, other in zip(*figures, strict=True):
        assert one == pytest.approx(other, rel=LAYERS32)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_factors_beyond_float16_are_refused_and_leave_the_model_as_it_was(quantize):
    """Of the second layer only one output matters, and another feature, 1e13 larger, tells it."""
    model = net(16, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight.copy_(2 * torch.eye(16))
        model[2].weight.copy_(torch.eye(16))
        model[0].bias.copy_(gaussian(16))
    model[2].bias = None
    model = model.half()
    before, layers = copy.deepcopy(model.state_dict()), list(model)
    seen = gaussian(1, 16).double().abs()
    seen[0, 1:] *= 1e-13
    stats = calibrate(model.float(), batches(16), targets=["0", "2"])
    model.half()
    products = torch.diag((torch.arange(16) == 1).double())
    gradients = replace(stats.gradients["2"], products=products, pulled_back=False)
    inputs = dict(stats.inputs)
    inputs[stats.sources["2"]] = replace(
        stats.moments("2"), weight=1e12, products=1e12 * seen.T @ seen, total=0 * seen[0]
    )
    stats = replace(stats, inputs=inputs, gradients={**stats.gradients, "2": gradients})
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(WeightError, match=r"^2: its factors have elements beyond what float16 holds"):
        compress(model, rank=1, stats=stats, metric="loss", quantize=quantize, targets=["0", "2"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model) == layers
    model.float()(batches(16)[0])
    assert calls == [1]

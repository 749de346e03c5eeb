"""Feed-forward blocks lose neurons: what is left computes what was planned, and is plain dense layers."""

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import PlanError, WeightError
from lowrank.inspection.inspection import Inspection
from lowrank.linalg.neurons import neuron_removal, refitted
from lowrank.surgery.neurons import layers_to_narrow, narrower_layers


class Gated(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.gate, self.up = nn.Linear(12, 48, bias=bias), nn.Linear(12, 48, bias=bias)
        self.down = nn.Linear(48, 12, bias=bias)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def case(bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gated(bias).eval()
        data = [torch.randn(80, 12) + 0.5 for _ in range(8)]
    return model, data, lowrank.calibrate(model, data)


def narrowed(model, data, stats, keep=0.5, **options):
    return lowrank.compress(
        copy.deepcopy(model), keep=keep, stats=stats, inputs=data[0], forms=["neurons"], **options
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_layers_are_those_of_the_kept_neurons_fitted_anew(bias):
    model, data, stats = case(bias)
    small = narrowed(model, data, stats)
    assert [type(small.get_submodule(name)) for name in ("gate", "up", "down")] == [nn.Linear] * 3
    metric = stats.metric("down", "loss", bias)
    kept = neuron_removal(model.down.weight, metric).kept(24)
    assert torch.equal(small.gate.weight, model.gate.weight[kept])
    assert torch.equal(small.up.weight, model.up.weight[kept])
    fitted = refitted(model.down.weight, kept, metric.inputs)
    assert torch.equal(small.down.weight, fitted.float())
    assert (small.gate.in_features, small.gate.out_features, small.down.in_features) == (12, 24, 24)
    if bias:
        assert torch.equal(small.gate.bias, model.gate.bias[kept])
        mean = stats.moments("down").mean
        moved = model.down.bias + model.down.weight.double() @ mean - fitted @ mean[kept]
        assert torch.allclose(small.down.bias.double(), moved, rtol=1e-6)
        rows = torch.cat(data)
        with torch.no_grad():
            expected, found = model(rows), small(rows)
        difference = (found - expected).mean(0)  # the bias has taken up the mean over the calibrated data
        assert float(difference.norm()) < 1e-5 * float(expected.norm(dim=1).mean())


def test_what_the_layers_have_beside_weights_stays():
    model, data, stats = case()
    model.up.weight.requires_grad_(False)
    model.gate.bias.requires_grad_(False)
    calls = []
    model.down.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    bias = model.down.bias
    lowrank.compress(model, keep=0.5, stats=stats, inputs=data[0], forms=["neurons"])
    calls.clear()
    model(data[0])
    assert calls == [1] and model.down.training and model.down.bias is bias
    assert not model.up.weight.requires_grad and model.gate.weight.requires_grad
    assert not model.gate.bias.requires_grad


def test_a_call_with_data_alone_calibrates_and_is_reproducible():
    model, data, _ = case()
    ones = [
        lowrank.compress(copy.deepcopy(model), keep=0.6, data=iter(data), forms=["neurons"]) for _ in range(2)
    ]
    assert ones[0].down.in_features == 24
    assert all(torch.equal(a, b) for a, b in zip(ones[0].parameters(), ones[1].parameters(), strict=True))


def test_a_weight_that_leaves_its_dtype_changes_nothing():
    model, data, stats = case()
    with torch.no_grad():
        model.down.weight.fill_(6e4)  # what takes over from others is above 65,504
    stats = lowrank.calibrate(model, data, loss=None)
    plan = lowrank.plan(model, keep=0.2, stats=stats, inputs=data[0], forms=["neurons"])
    model.half()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightError, match=r"down: fitted anew to 8 neurons, its weight leaves the range of"):
        list(narrower_layers(model, plan, layers_to_narrow(Inspection(model), plan, {}), stats))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_narrower_model_is_not_narrowed_again_and_says_why():
    model, data, stats = case()
    small = narrowed(model, data, stats)
    with pytest.raises(
        lowrank.LowRankError, match=r"has lost neurons already: its weight was \(out=48, in=12\)"
    ):
        lowrank.compress(small, keep=0.5, data=data, forms=["neurons"])
    plan = lowrank.plan(model, keep=0.7, stats=stats, inputs=data[0], forms=["neurons"])
    with pytest.raises(PlanError, match=r"gate: the plan is for a weight \(out=48, in=12\)"):
        lowrank.apply(small, plan, stats)


def test_applying_a_plan_twice_is_applying_it_once():
    model, data, stats = case()
    plan = lowrank.plan(model, keep=0.5, stats=stats, inputs=data[0], forms=["neurons"])
    small = lowrank.apply(copy.deepcopy(model), plan, stats)
    weight = small.down.weight
    lowrank.apply(small, plan, stats)
    assert small.down.weight is weight


def test_a_checkpoint_is_loaded_into_the_dense_architecture_without_data(tmp_path):
    model, data, stats = case()
    small = narrowed(model, data, stats)
    lowrank.save(small, tmp_path / "small")
    with torch.device("meta"):
        empty = Gated()
    loaded = lowrank.load(tmp_path / "small", empty).eval()
    assert torch.equal(loaded(data[0]), small(data[0])) and loaded.down.in_features == 24
    lowrank.save(loaded, tmp_path / "again")
    assert torch.equal(lowrank.load(tmp_path / "again", Gated()).eval()(data[0]), small(data[0]))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    model, data, stats = case()
    lowrank.save(narrowed(model, data, stats), tmp_path / "small")
    other = nn.ModuleDict({name: nn.Linear(12, 12) for name in ("gate", "up", "down")})
    with pytest.raises(
        lowrank.errors.CheckpointError, match=r"does not fit the architecture: gate: the plan is"
    ):
        lowrank.load(tmp_path / "small", other)

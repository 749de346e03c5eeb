"""`calibrate`: what it leaves as it was, and what it refuses."""

import copy

import pytest
import torch
from random_tensors import gaussian
from torch import nn

import lowrank
from lowrank import (
    CheckpointError,
    DataError,
    LowRankError,
    StatsError,
    WeightError,
    calibrate,
    compress,
    decompress,
)


def test_the_same_seed_gives_the_same_statistics_and_leaves_the_random_state(mlp, data):
    before = torch.get_rng_state()
    first, second, other = (calibrate(mlp, data, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.gradients["2"].products, second.gradients["2"].products)
    assert not torch.equal(first.gradients["2"].products, other.gradients["2"].products)


def state(model: nn.Module) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_model_as_it_was(mlp, data, error):
    mlp.train()
    mlp[0].weight.requires_grad_(False)
    mlp[2].register_forward_hook(lambda *_: None)
    before, calls = state(mlp), []

    def loss(outputs, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise error("stopped here")
        return outputs.mean()

    with pytest.raises(error, match="stopped here"):
        calibrate(mlp, data, loss=loss)
    assert state(mlp) == before


BAD = {
    "empty": ([], None, "auto", DataError, "no batch"),
    "one-string": ("text", None, "auto", DataError, "list of strings"),
    "strings-without-a-tokenizer": (["text"], None, "auto", DataError, "tokenizer"),
    "not-a-batch": ([3], None, "auto", DataError, "Batch 0 is int"),
    "refused-batch": (
        [gaussian(2, 64), gaussian(2, 7)],
        None,
        "auto",
        DataError,
        "Batch 1: Sequential refuses",
    ),
    "nan": ([torch.full((2, 64), float("nan"))], None, "auto", StatsError, "^0: reads NaN"),
    "loss-not-scalar": ([gaussian(2, 64)], None, lambda o, b: o, DataError, r"shape \(2, 64\)"),
    "loss-a-number": ([gaussian(2, 64)], None, lambda o, b: 1.0, DataError, "float"),
    "loss-detached": ([gaussian(2, 64)], None, lambda o, b: o.detach().sum(), DataError, "gradient"),
    "loss-unknown": ([gaussian(2, 64)], None, "mse", DataError, "auto"),
    "loss-array": ([gaussian(2, 64)], None, gaussian(2).numpy(), DataError, "auto"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_where_and_what_to_do(mlp, case):
    data, tokenizer, loss, error, message = BAD[case]
    before = state(mlp)
    with pytest.raises(error, match=message):
        calibrate(mlp, data, tokenizer, loss)
    assert state(mlp) == before


def test_a_compressed_model_with_tied_layers_can_be_calibrated_as_far_as_it_is_dense(mlp, data):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    model[1].weight = model[0].weight
    compress(model, rank=4, targets=["0", "1"])
    assert sorted(calibrate(model, data).sources) == ["2"]
    decompress(model)
    assert sorted(calibrate(model, data).sources) == ["0", "1", "2"]


def test_a_model_on_the_meta_device_cannot_run_and_the_error_says_so(mlp, data):
    empty = nn.Sequential(nn.Linear(64, 96, device="meta"), nn.Linear(96, 64, device="meta"))
    small = compress(nn.Sequential(nn.Linear(64, 64)), rank=4)
    calls = {
        "calibrate": lambda: calibrate(empty, data),
        "recover": lambda: lowrank.recover(small, empty, data, steps=1),
        "report": lambda: lowrank.report(small, dense=empty, data=data),
        "benchmark": lambda: lowrank.benchmark(empty, copy.deepcopy(small).to("meta"), data[0]),
        "sequential": lambda: compress(empty, rank=4, sequential=True, data=data),
        "plan": lambda: lowrank.plan(empty, keep=0.5),
        "quantize": lambda: lowrank.quantize(empty),
    }
    for call in calls.values():
        with pytest.raises(WeightError, match="meta device"):
            call()
    with pytest.raises(CheckpointError, match=r"0\.weight: on the meta device, without data"):
        lowrank.save(empty, "never")


def test_layers_without_a_shape_yet_are_refused_by_every_call(data):
    lazy = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64))
    small = compress(nn.Sequential(nn.Linear(64, 64)), rank=4)
    calls = [
        lambda: calibrate(lazy, data),
        lambda: compress(lazy, rank=4),
        lambda: lowrank.plan(lazy, rank=4),
        lambda: lowrank.quantize(lazy),
        lambda: decompress(lazy),
        lambda: lowrank.recover(small, lazy, data, steps=1),
        lambda: lowrank.report(lazy),
        lambda: lowrank.error_curves(lazy),
        lambda: lowrank.save(lazy, "never"),
    ]
    for call in calls:
        with pytest.raises(LowRankError, match=r"0\.weight: has no shape yet.*Call the model on a batch"):
            call()
    lazy(data[0])
    compress(lazy, rank=4)

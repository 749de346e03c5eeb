"""A layer's factors: the error in the plan is the one measured after applying."""

import copy

import pytest
import torch
from bert_states import dense_weights, frobenius_errors
from closeness import CANCELLED32, SUMS32
from torch import nn

from lowrank import apply, compress, decompress, plan
from lowrank.linalg import choose_solver


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"]
)
@pytest.mark.parametrize(
    "budget",
    [{"rank": 12}, {"keep": 0.5}, {"error": 0.7}, {"energy": 0.5}],
    ids=["rank", "keep", "error", "energy"],
)
def test_the_error_in_the_plan_is_the_one_measured_after_applying(tiny_bert, budget, dtype):
    model = tiny_bert.to(dtype)
    weights = dense_weights(model)
    decided = plan(model, **budget)
    apply(model, decided)
    measured = frobenius_errors(model, {layer.name: weights[layer.name] for layer in decided.factorized})
    assert measured
    for name, error in measured.items():
        # Storing two factors adds about a unit of rounding, at right angles to the error itself.
        rounded = (error**2 + torch.finfo(dtype).eps ** 2) ** 0.5 - error + 1e-6
        assert decided[name].relative_error == pytest.approx(error, rel=1e-4, abs=rounded)
        assert model.get_submodule(name).relative_error == pytest.approx(error, rel=1e-4)


def test_the_error_in_the_plan_is_within_the_tolerance_where_the_solver_is_randomized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(560, 520))
    assert choose_solver(520, 560, 60) == "randomized"
    weights, decided = dense_weights(model), plan(model, rank=60)
    error = frobenius_errors(apply(model, decided), weights)["0"]
    predicted = decided["0"].relative_error
    assert predicted * (1 - 1e-6) <= error <= predicted * (1 + 1e-3)
    assert model[0].relative_error == pytest.approx(error, rel=SUMS32)


def large_model() -> nn.Sequential:
    """A layer for each solver: the first is randomized at rank 16, the second exact."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(520, 520), nn.Linear(520, 64))


def test_equal_seeds_give_equal_bits():
    model = large_model()
    assert choose_solver(520, 520, 16) == "randomized"
    one, two, other = (compress(copy.deepcopy(model), rank=16, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[0].up.weight, other[0].up.weight)


def test_the_global_random_state_is_neither_read_nor_moved():
    one, two = large_model(), large_model()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    compress(one, rank=16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    compress(two, rank=16)
    assert torch.equal(one[0].up.weight, two[0].up.weight)
    decompress(one)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_models_are_compressed_where_they_are(tiny_bert):
    model = tiny_bert.to("cuda")
    weights = {name: weight.cpu() for name, weight in dense_weights(model).items()}
    decided = plan(model, rank=8)
    apply(model, decided)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    for name, error in frobenius_errors(
        model.cpu(), {x.name: weights[x.name] for x in decided.factorized}
    ).items():
        assert decided[name].relative_error == pytest.approx(error, rel=CANCELLED32)

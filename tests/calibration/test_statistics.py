"""Statistics as data: round trips, refusals, metrics."""

import json

import pytest
import torch
from closeness import CANCELLED32
from random_tensors import gaussian
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank import Stats, StatsError, apply, calibrate, compress, plan
from lowrank.calibration.held_out_errors import HELD_OUT_SUMS
from lowrank.errors import BudgetError, CheckpointError, PlanError


def test_they_survive_saving_and_loading_bit_for_bit(mlp_stats, tmp_path):
    mlp_stats.save(tmp_path / "stats")
    again = Stats.load(tmp_path / "stats")
    assert again.fingerprint == mlp_stats.fingerprint
    assert (again.sources, again.tokens, again.terms) == (
        mlp_stats.sources,
        mlp_stats.tokens,
        mlp_stats.terms,
    )
    assert again.held_out.keys() == mlp_stats.held_out.keys() == set(mlp_stats.sources)
    for name in mlp_stats.sources:
        held, found = mlp_stats.held_out[name], again.held_out[name]
        assert (found.tokens, found.samples) == (held.tokens, held.samples)
        assert all(torch.equal(getattr(found, part), getattr(held, part)) for part in HELD_OUT_SUMS)
        assert torch.equal(again.moments(name).products, mlp_stats.moments(name).products)
        assert torch.equal(again.moments(name).total, mlp_stats.moments(name).total)
        assert torch.equal(again.gradients[name].products, mlp_stats.gradients[name].products)


def test_a_folder_with_files_is_not_overwritten_unasked(mlp_stats, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        mlp_stats.save(tmp_path)
    mlp_stats.save(tmp_path, overwrite=True)
    assert Stats.load(tmp_path).tokens == mlp_stats.tokens


def edit(folder, change):
    data = json.loads((folder / "stats.json").read_text())
    change(data)
    (folder / "stats.json").write_text(json.dumps(data))


def retensor(folder, change):
    tensors = load_file(folder / "stats.safetensors")
    change(tensors)
    save_file(tensors, folder / "stats.safetensors")


DAMAGE = {
    "newer": (lambda f: edit(f, lambda d: d.update(format=99)), "newer lowrank"),
    "no-json": (lambda f: (f / "stats.json").unlink(), "cannot be read"),
    "no-tensors": (lambda f: (f / "stats.safetensors").unlink(), "cannot be read"),
    "not-json": (lambda f: (f / "stats.json").write_text("{"), "damaged"),
    "a-list": (lambda f: (f / "stats.json").write_text("[]"), "damaged"),
    "truncated": (
        lambda f: (f / "stats.safetensors").write_bytes((f / "stats.safetensors").read_bytes()[:-8]),
        "cannot be read",
    ),
    "missing-tensor": (lambda f: retensor(f, lambda t: t.pop("inputs.0.total")), "inputs.0.total"),
    "nan": (lambda f: retensor(f, lambda t: t["inputs.0.total"].fill_(float("nan"))), "inputs.0.total"),
    "half": (
        lambda f: retensor(f, lambda t: t.update({"inputs.0.total": t["inputs.0.total"].half()})),
        "inputs.0.total",
    ),
    "another-sum": (
        lambda f: retensor(f, lambda t: t["inputs.0.total"].add_(1)),
        "total is not the",
    ),
    "another-number": (lambda f: edit(f, lambda d: d.update(tokens=1)), "is not as it was saved"),
    "huge": (lambda f: edit(f, lambda d: d.update(tokens=10**400)), "tokens=1000"),
    "negative": (lambda f: edit(f, lambda d: d["inputs"].update({"0": -1})), "inputs of 0=-1"),
    "infinite": (lambda f: edit(f, lambda d: d["inputs"].update({"0": float("inf")})), "inputs of 0=inf"),
    "text": (lambda f: edit(f, lambda d: d.update(terms="5")), "terms='5'"),
    "nested": (lambda f: (f / "stats.json").write_text("[" * 100_000), "nested too deeply"),
    "unknown-source": (lambda f: edit(f, lambda d: d["sources"].update({"0": "x"})), "'x'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_with_the_folder(mlp_stats, tmp_path, case):
    folder = tmp_path / "stats"
    mlp_stats.save(folder)
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(StatsError, match=message) as caught:
        Stats.load(folder)
    assert str(folder) in str(caught.value)


def test_statistics_of_another_model_are_refused(mlp_stats):
    other = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    before = other[0].weight.clone()
    with pytest.raises(StatsError, match="another model"):
        compress(other, keep=0.5, stats=mlp_stats)
    assert torch.equal(other[0].weight, before)


def test_statistics_of_different_models_cannot_be_added(mlp_stats):
    other = calibrate(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), [gaussian(4, 64)])
    with pytest.raises(StatsError, match="cannot be added"):
        mlp_stats + other


def test_a_metric_that_the_statistics_lack_is_refused(mlp):
    bare = calibrate(mlp, [gaussian(60, 64)], loss=None)
    with pytest.raises(BudgetError, match="no gradient of the loss reached it"):
        plan(mlp, keep=0.5, stats=bare, metric="loss")
    with pytest.raises(BudgetError, match="needs statistics"):
        plan(mlp, keep=0.5, metric="inputs")
    with pytest.raises(BudgetError, match="give one of"):
        plan(mlp, keep=0.5, stats=bare, metric="taste")


@pytest.mark.parametrize("metric", ["diagonal", "inputs", "loss"])
def test_outputs_are_closer_than_those_of_the_weights_metric(mlp, mlp_stats, metric):
    import copy

    inputs = gaussian(500, 64, seed=77) * torch.logspace(0, -2, 64)
    target = mlp(inputs).detach()

    def error(model):
        return float((model(inputs) - target).detach().square().sum())

    plain = compress(copy.deepcopy(mlp), rank=12)
    aware = compress(copy.deepcopy(mlp), rank=12, stats=mlp_stats, metric=metric)
    assert error(aware) < 0.8 * error(plain)


def test_the_bias_takes_up_the_mean_of_the_error(mlp):
    data = [gaussian(200, 64, seed=i) + 2 for i in range(8)]
    dense = mlp(torch.cat(data)).detach()
    small = compress(mlp, rank=8, data=data, metric="inputs", targets=["2"])
    difference = (small(torch.cat(data)).detach() - dense).mean(0)
    assert difference.abs().max() < 1e-3 * dense.abs().mean()


@pytest.mark.parametrize("add_bias", [False, True])
def test_a_bias_is_added_only_when_allowed_and_survives_saving(tmp_path, add_bias):
    import lowrank

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 64))

    model = build()
    data = [gaussian(100, 64, seed=i) + 1 for i in range(4)]
    small = compress(model, rank=8, data=data, add_bias=add_bias)
    assert (small[0].bias is not None) == add_bias
    lowrank.save(small, tmp_path / "small")
    again = lowrank.load(tmp_path / "small", build())
    inputs = gaussian(3, 64)
    assert torch.equal(again(inputs), small(inputs))


def test_apply_needs_the_statistics_that_the_plan_was_made_with(mlp, mlp_stats):
    decided = plan(mlp, keep=0.5, stats=mlp_stats)
    with pytest.raises(PlanError, match="pass stats="):
        apply(mlp, decided)
    apply(mlp, decided, mlp_stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predicted_errors_are_those_of_the_factors(mlp, dtype):
    mlp.to(dtype)
    stats = calibrate(mlp, [gaussian(60, 64, seed=i).to(dtype) for i in range(8)])
    decided = plan(mlp, keep=0.5, stats=stats)
    apply(mlp, decided, stats)
    for layer in decided.factorized:
        assert mlp.get_submodule(layer.name).relative_error == pytest.approx(
            layer.relative_error, rel=CANCELLED32
        )


@pytest.mark.parametrize("widest", [80, 40], ids=["inputs-of-one-layer", "everything"])
def test_very_wide_layers_keep_diagonals_only_and_the_plan_says_so(mlp, monkeypatch, widest):
    from lowrank.calibration import collector

    monkeypatch.setattr(collector, "WIDEST", widest)
    data = [gaussian(60, 64, seed=i) * torch.logspace(0, -2, 64) for i in range(8)]
    stats = calibrate(mlp, data)
    assert stats.moments("2").products.shape == (96,)
    decided = plan(mlp, keep=0.5, stats=stats)
    assert "diagonal statistics" in decided["2"].reason
    assert ("diagonal statistics" in decided["0"].reason) == (widest < 64)
    apply(mlp, decided, stats)


def test_an_interrupted_apply_can_be_finished_with_the_same_statistics(mlp, mlp_stats, monkeypatch):
    from lowrank import LowRankLinear
    from lowrank.surgery import factorization

    decided = plan(mlp, keep=0.5, stats=mlp_stats)
    real, calls = factorization.truncated_svd, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(factorization, "truncated_svd", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(mlp, decided, mlp_stats)
    apply(mlp, decided, mlp_stats)
    assert all(isinstance(mlp.get_submodule(layer.name), LowRankLinear) for layer in decided.factorized)

"""Tensors of a checkpoint: each once, none overlapping, none without data."""

import re
from collections import OrderedDict
from functools import partial

import pytest
import torch
from checkpoint_folders import (
    METADATA,
    Mixed,
    Tied,
    assert_refused,
    build_mlp,
    compressed,
    edit,
    sealed_again,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import CheckpointError, LowRankError


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_a_buffer_of_any_dtype_is_either_stored_at_the_predicted_size_or_refused_by_name(dtype, tmp_path):
    model = compressed(build_mlp)
    model.register_buffer("table", torch.zeros(5).to(dtype))
    refusal = None
    try:
        size = lowrank.report(model).checkpoint_bytes
        folder = lowrank.save(model, tmp_path / "small")
    except CheckpointError as error:
        refusal = str(error)
    if refusal is None:
        assert (folder / "model.safetensors").stat().st_size == size
    else:
        assert "table" in refusal and str(dtype) in refusal


def test_a_buffer_that_no_checkpoint_holds_is_not_left_without_data_silently(tmp_path):
    def build() -> nn.Module:
        model = build_mlp()
        model.register_buffer("scale", torch.ones(64), persistent=False)
        return model

    lowrank.save(compressed(build), tmp_path / "small")
    with torch.device("meta"):
        empty = build()
    refusal = ""
    try:
        again = lowrank.load(tmp_path / "small", empty)
    except LowRankError as error:
        refusal = str(error)
    assert "scale" in refusal or not again.scale.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_stay_ties(device, tmp_path):
    lowrank.save(compressed(Tied), tmp_path / "small")
    with torch.device(device):
        model = Tied()
    again = lowrank.load(tmp_path / "small", model)
    assert again.decoder.weight is again.embedding.weight
    assert "decoder.weight" not in load_file(tmp_path / "small" / "model.safetensors")


def test_a_module_used_twice_is_stored_once_and_stays_shared(tmp_path):
    def build() -> nn.Module:
        shared = nn.Linear(64, 64)
        return nn.Sequential(shared, nn.Linear(64, 64), shared)

    model = lowrank.compress(build().eval(), rank=8)
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), build().eval())
    assert again[0].weight is again[2].weight
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))


def test_views_of_one_storage_are_saved_with_their_own_values(tmp_path):
    model = compressed(build_mlp)
    storage = torch.arange(20.0)
    model.register_buffer("head", storage[:10])
    model.register_buffer("rest", storage[10:])
    other = build_mlp()
    other.register_buffer("head", torch.zeros(10))
    other.register_buffer("rest", torch.zeros(10))
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), other)
    assert again.head.tolist() == list(range(10))
    assert again.rest.tolist() == list(range(10, 20))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w[:3],
        lambda w: w[1:],
        lambda w: w.reshape(-1),
    ],
    ids=["transposed", "rows", "later-rows", "flat"],
)
def test_a_parameter_that_is_a_view_of_another_is_refused_with_both_names(view, tmp_path):
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False)))
    model.b.weight = nn.Parameter(view(model.a.weight.detach()))
    with pytest.raises(CheckpointError, match=r"a\.weight and b\.weight share memory, but are not the same"):
        lowrank.save(model, tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_parts_of_one_memory_that_do_not_overlap_are_saved(tmp_path):
    whole = torch.randn(8, 16)
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False)))
    model.a.weight, model.b.weight = (nn.Parameter(part) for part in (whole[:, :8], whole[:, 8:]))
    lowrank.save(model, tmp_path)
    fresh = nn.Sequential(OrderedDict(a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False)))
    loaded = lowrank.load(tmp_path, fresh)
    assert torch.equal(torch.cat([loaded.a.weight, loaded.b.weight], 1), whole)


def test_a_parameter_that_is_not_contiguous_comes_back(tmp_path):
    model = compressed(build_mlp)
    model[0].up.weight = nn.Parameter(torch.randn(8, 96).T)
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), build_mlp())
    assert torch.equal(again[0].up.weight, model[0].up.weight)


@pytest.mark.parametrize(
    "name", ["first.up.weight", "last.up.bias", "norm.weight", "norm.running_var", "scale"]
)
def test_nan_is_refused_by_name_wherever_it_is(name, tmp_path):
    model = compressed(Mixed)
    folder = lowrank.save(model, tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata=METADATA)
    sealed_again(folder)
    assert_refused(folder, f"the tensor {name} has NaN", model=Mixed())
    model.load_state_dict(tensors)
    with pytest.raises(CheckpointError, match=rf"the tensor {re.escape(name)} has NaN"):
        lowrank.save(model, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_mask_in_a_buffer_may_be_infinite(tmp_path):
    def build() -> nn.Module:
        model = build_mlp()
        model.register_buffer("mask", torch.full((3,), -float("inf")))
        return model

    again = lowrank.load(lowrank.save(compressed(build), tmp_path / "small"), build())
    assert again.mask.tolist() == [-float("inf")] * 3


def test_an_alias_of_a_tensor_that_does_not_exist_is_refused(tmp_path):
    folder = lowrank.save(compressed(Mixed), tmp_path / "small")
    edit(folder, lambda data: data["aliases"].update({"norm.num_batches_tracked": "nowhere"}))
    assert_refused(folder, "lowrank.json", "nowhere", model=Mixed())


def test_an_alias_between_a_parameter_and_a_buffer_is_refused(tmp_path):
    folder = lowrank.save(compressed(Mixed), tmp_path / "small")
    edit(folder, lambda data: data["aliases"].update({"norm.weight": "norm.running_mean"}))
    assert_refused(folder, "norm.weight", model=Mixed())


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(CheckpointError, match=r"_extra_state.*dict.*not a tensor"):
        lowrank.save(Extra(*build_mlp()), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_model_without_data_is_refused_by_name(tmp_path):
    with torch.device("meta"):
        model = build_mlp()
    with pytest.raises(CheckpointError, match=r"0\.weight.*meta device"):
        lowrank.save(model, tmp_path / "small")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "layer",
    [(nn.Linear, 64, 0), (nn.Linear, 0, 64), (nn.Embedding, 0, 8), (nn.Embedding, 8, 0)],
    ids=["no-outputs", "no-inputs", "no-rows", "no-columns"],
)
def test_layers_without_elements_are_saved_and_loaded(tmp_path, layer):
    build = partial(*layer)
    model = nn.Sequential(nn.Linear(64, 64), build())
    lowrank.compress(model, rank=4, targets=["0"])
    lowrank.save(model, tmp_path / "x")
    again = lowrank.load(tmp_path / "x", nn.Sequential(nn.Linear(64, 64), build()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    lowrank.report(again)

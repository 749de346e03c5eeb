"""What `lowrank.save` writes comes back bit for bit, or is refused by name and nothing changes."""

import re
from pathlib import Path

import pytest
import torch
from allocations import LargestTensor
from checkpoint_folders import (
    Mixed,
    assert_refused,
    build_mlp,
    compressed,
    contents,
    edit,
    every_model,
    example_input,
    sealed_again,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import CheckpointError, LowRankError, LowRankLinear


@every_model
def test_loading_gives_bit_identical_outputs_and_tensors(build, tmp_path):
    model = compressed(build)
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), build().eval())
    inputs = example_input(model)
    assert torch.equal(again(inputs), model(inputs))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype, name


@every_model
def test_a_meta_model_is_filled_completely(build, tmp_path):
    model = compressed(build)
    lowrank.save(model, tmp_path / "small")
    with torch.device("meta"):
        empty = build().eval()
    again = lowrank.load(tmp_path / "small", empty)
    assert {tensor.device.type for tensor in again.state_dict().values()} == {"cpu"}
    inputs = example_input(model)
    assert torch.equal(again(inputs), model(inputs))


def test_loading_into_a_meta_model_never_makes_a_dense_weight(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512))

    with LargestTensor() as control:
        build()
    assert control.elements == 512 * 512  # the instrument sees dense weights
    lowrank.save(lowrank.compress(build(), rank=8), tmp_path / "small")
    with torch.device("meta"):
        empty = build()
    with LargestTensor() as loading:
        lowrank.load(tmp_path / "small", empty)
    assert 0 < loading.elements <= 8 * 512


@pytest.mark.parametrize(("part", "value"), [("codes", -128), ("scale", 0.0), ("scale", -1.0)])
def test_values_that_no_quantized_weight_has_are_refused_though_the_digests_fit(part, value, tmp_path):
    lowrank.save(lowrank.compress(build_mlp(), keep=0.9, quantize="int8"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f".{part}"))
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sealed_again(tmp_path)
    fresh = build_mlp()
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=rf"the tensor {re.escape(name)} has values that no quantized weight"
    ):
        lowrank.load(tmp_path, fresh)
    assert all(torch.equal(before[key], tensor) for key, tensor in fresh.state_dict().items())


def test_a_dense_model_is_saved_and_loaded_too(tmp_path):
    model = build_mlp()
    again = lowrank.load(lowrank.save(model, tmp_path / "dense"), build_mlp())
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
    assert type(again[0]) is nn.Linear


def test_the_compressed_architecture_can_be_loaded_into_as_well(mlp_folder):
    model = compressed(build_mlp)
    with torch.no_grad():
        model[0].down.weight.zero_()
    assert lowrank.load(mlp_folder, model)[0].down.weight.abs().sum() > 0


def test_frozen_parameters_of_the_given_model_stay_frozen(mlp_folder):
    model = build_mlp()
    model[0].requires_grad_(False)
    again = lowrank.load(mlp_folder, model)
    assert not any(p.requires_grad for p in again[0].parameters())
    assert all(p.requires_grad for p in again[2].parameters())


def test_loading_returns_the_given_model_with_its_ranks_and_errors(mlp_folder):
    model = build_mlp()
    again = lowrank.load(mlp_folder, model)
    assert again is model
    original = compressed(build_mlp)
    assert [(m.rank, m.relative_error) for m in again if isinstance(m, LowRankLinear)] == [
        (m.rank, m.relative_error) for m in original if isinstance(m, LowRankLinear)
    ]


def test_saving_twice_writes_the_same_bytes(tmp_path):
    model = compressed(Mixed)
    first = contents(lowrank.save(model, tmp_path / "a"))
    again = lowrank.load(tmp_path / "a", Mixed().eval())
    assert contents(lowrank.save(again, tmp_path / "b")) == first


def test_a_missing_tensor_file_is_refused(mlp_folder):
    (mlp_folder / "model.safetensors").unlink()
    assert_refused(mlp_folder, str(mlp_folder / "model.safetensors"))


WRONG_ARCHITECTURES = {
    "other-width": (
        lambda: nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 64)),
        ": 0: the plan is for",
    ),
    "another-layer": (lambda: nn.Sequential(*build_mlp(), nn.Linear(64, 8)), "3."),
    "a-layer-less": (lambda: nn.Sequential(nn.Linear(64, 96)), ": 2: Sequential has no such layer"),
    "no-bias": (lambda: nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 64)), "0."),
    "other-names": (
        lambda: nn.ModuleDict({"a": nn.Linear(64, 96), "b": nn.Linear(96, 64)}),
        ": 0: ModuleDict has no such layer",
    ),
    "other-rank": (lambda: lowrank.compress(build_mlp(), rank=4), ": 0: factorized already, at rank 4"),
}


@pytest.mark.parametrize(("build", "named"), WRONG_ARCHITECTURES.values(), ids=WRONG_ARCHITECTURES.keys())
def test_another_architecture_is_refused(mlp_folder, build, named):
    assert_refused(mlp_folder, str(mlp_folder), named, model=build())


def test_a_model_with_state_that_is_no_tensor_is_refused_on_loading(mlp_folder):
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"anything": 1}

    assert_refused(mlp_folder, "_extra_state", model=Extra(*build_mlp()))


@pytest.mark.parametrize("rank", [4, 10_000, 0, -3, "8", 8.5, True], ids=repr)
def test_a_rank_edited_by_hand_is_refused_with_the_file_and_the_layer(mlp_folder, rank):
    edit(mlp_folder, lambda data: data["plan"]["layers"][0].update(rank=rank))
    assert_refused(mlp_folder, str(mlp_folder), "0")


def test_a_plan_for_a_layer_that_does_not_exist_is_refused(mlp_folder):
    edit(mlp_folder, lambda data: data["plan"]["layers"][0].update(name="nowhere"))
    assert_refused(mlp_folder, str(mlp_folder), ": nowhere: Sequential has no such layer")


def test_a_loaded_model_does_not_depend_on_the_file_any_more(mlp_folder):
    model = lowrank.load(mlp_folder, build_mlp())
    before = model[0].down.weight.clone()
    (mlp_folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(model[0].down.weight, before)


def test_a_folder_without_a_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"no lowrank\.json and no config\.json"):
        lowrank.load(tmp_path, build_mlp())


def test_loading_without_an_architecture_asks_for_it(mlp_folder):
    with pytest.raises(CheckpointError, match=r"load\(folder, model=MyModel\(\)\)"):
        lowrank.load(mlp_folder)


def test_the_model_must_be_a_module(mlp_folder):
    with pytest.raises(LowRankError, match="not str"):
        lowrank.load(mlp_folder, "bert")  # type: ignore[arg-type]


def test_nothing_in_the_library_unpickles():
    sources = list(Path(lowrank.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    pickling = re.compile(
        r"torch\.(load|save)\(|^\s*(import|from) (pickle|dill|joblib|cloudpickle)|weights_only", re.M
    )
    assert {
        str(file): pickling.findall(file.read_text()) for file in sources if pickling.search(file.read_text())
    } == {}

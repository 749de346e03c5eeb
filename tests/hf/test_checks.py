"""A folder whose tensors do not fit its plan is refused with the name of the tensor."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from saved_models import FAMILIES, LAYER, assert_same_outputs, change_tensors, llama, mixtral, small
from torch import Tensor
from transformers import AutoModel

import lowrank
from lowrank import CheckpointError, LowRankError


def edit_config(folder: Path, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"]["plan"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "keep", [0, 4, 1000, 0.5, -1], ids=["empty", "4-bytes", "header", "half", "one-byte-short"]
)
def test_a_truncated_file_is_refused_by_name(saved, keep):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        transformers.BertModel.from_pretrained(saved)


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    small().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=shard.name):
        transformers.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["down.weight", "up.weight", "up.bias"])
def test_a_missing_factor_is_refused_by_name(saved, kind):
    file, name = saved / "model.safetensors", f"encoder.layer.1.output.dense.{kind}"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        transformers.BertModel.from_pretrained(saved)


def test_a_missing_tensor_that_is_no_factor_is_refused_by_name(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.1.output.LayerNorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.LayerNorm\.weight"):
        transformers.BertModel.from_pretrained(saved)


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    small().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((CheckpointError, OSError), match=shard.name):
        transformers.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("rank", [4, 16, 10_000, 0, -1, "8", None], ids=repr)
def test_a_rank_edited_by_hand_is_refused(saved, rank):
    edit_config(saved, lambda plan: plan["layers"][0].update(rank=rank))
    with pytest.raises(LowRankError, match=r"encoder\.layer\.0\.attention\.self\.query"):
        transformers.BertModel.from_pretrained(saved)


@pytest.mark.parametrize("rank", [0, 10_000, "8"], ids=repr)
def test_an_impossible_rank_is_an_error_about_the_file(saved, rank):
    edit_config(saved, lambda plan: plan["layers"][0].update(rank=rank))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        transformers.BertModel.from_pretrained(saved)


def test_a_newer_plan_is_refused(saved):
    edit_config(saved, lambda plan: plan.update(format=99))
    with pytest.raises(CheckpointError, match=r"config\.json: .*format 99.*newer"):
        transformers.BertModel.from_pretrained(saved)


def test_an_unknown_field_is_refused(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["bits"] = 4
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: .*bits"):
        transformers.BertModel.from_pretrained(saved)


@pytest.mark.parametrize("plan", [None, 3, [], {}, {"format": 2}], ids=repr)
def test_a_section_without_a_plan_is_refused(saved, plan):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["plan"] = plan
    file.write_text(json.dumps(config))
    with pytest.raises(LowRankError, match=r"plan|budget"):
        transformers.BertModel.from_pretrained(saved)


def test_a_checkpoint_of_another_architecture_is_refused(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(CheckpointError, match="in=32"):
        transformers.BertModel.from_pretrained(saved)


def test_a_stray_tensor_in_a_factorized_layer_is_refused(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {"encoder.layer.0.output.dense.mid.weight": torch.zeros(2)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*output\.dense\.mid\.weight is no part"):
        AutoModel.from_pretrained(tmp_path)


def as_integers(tensors: dict[str, Tensor], name: str) -> None:
    if name in tensors:
        tensors[name] = tensors[name].to(torch.int32)


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("kind", ["weight", "down.weight", "up.weight", "up.bias"])
def test_a_factor_of_integers_is_refused_by_name(kind, shard, tmp_path):
    small().save_pretrained(tmp_path, max_shard_size=shard)
    change_tensors(tmp_path, lambda tensors: as_integers(tensors, f"{LAYER}.{kind}"))
    message = rf"model.*\.safetensors: the tensor {re.escape(LAYER)}\.{kind} is stored as I32"
    with pytest.raises(CheckpointError, match=message):
        transformers.BertModel.from_pretrained(tmp_path)


def test_a_factor_of_integers_is_refused_also_by_a_model_with_a_head(saved):
    change_tensors(saved, lambda tensors: as_integers(tensors, f"{LAYER}.up.bias"))
    with pytest.raises(CheckpointError, match=r"output\.dense\.up\.bias is stored as I32"):
        transformers.BertForSequenceClassification.from_pretrained(saved)


def test_other_weights_of_integers_are_refused_too(saved):
    name = "encoder.layer.1.output.LayerNorm.weight"
    change_tensors(saved, lambda tensors: as_integers(tensors, name))
    with pytest.raises(CheckpointError, match=rf"{name} is stored as I32"):
        transformers.BertModel.from_pretrained(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("kind", ["down.weight", "up.weight", "up.bias"])
def test_a_factor_that_is_not_finite_is_refused_by_name(kind, value, saved):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{kind}"].view(-1)[5] = value

    change_tensors(saved, spoil)
    with pytest.raises(CheckpointError, match=rf"small: the tensor {LAYER}\.{kind} has NaN or infinite"):
        transformers.BertModel.from_pretrained(saved)


def test_a_factor_that_overflows_in_the_dtype_asked_for_is_refused(saved):
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.up.weight"][0, 0] = 1e6  # above the largest float16

    change_tensors(saved, enlarge)
    transformers.BertModel.from_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"up\.weight has .* in torch\.float16\. Load it in the dtype"):
        transformers.BertModel.from_pretrained(saved, dtype=torch.float16)


def test_layers_on_disk_are_loaded_without_being_read_into_memory(saved, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    places = {"embeddings": "cpu", "encoder.layer.0": "disk", "encoder.layer.1": "cpu", "pooler": "cpu"}
    model = transformers.BertModel.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "off")
    assert all(parameter.is_meta for parameter in model.encoder.layer[0].parameters())
    with torch.backends.mkldnn.flags(enabled=False):  # the same kernels with hooks on the factors as without
        assert_same_outputs(model, transformers.BertModel.from_pretrained(saved))


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("build", [*FAMILIES.values(), mixtral], ids=[*FAMILIES, "mixtral"])
def test_a_stray_tensor_is_refused_by_name(build, shard, tmp_path):
    model = small(build)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    tensors = load_file(last) | {"encoder.backdoor.weight": torch.zeros(2)}
    save_file(tensors, last, metadata={"format": "pt"})
    message = rf"{last.name}: has the tensor encoder\.backdoor\.weight, which {type(model).__name__} does not"
    with pytest.raises(CheckpointError, match=message):
        type(model).from_pretrained(tmp_path)


def test_a_model_without_the_head_need_not_know_its_tensors(tmp_path):
    head = small(FAMILIES["bert-sequence-classification"])
    head.save_pretrained(tmp_path)
    extra = torch.zeros(2)
    change_tensors(tmp_path, lambda tensors: tensors.update({"classifier.extra.weight": extra}))
    assert_same_outputs(head.bert, transformers.BertModel.from_pretrained(tmp_path))


def test_tensors_that_the_class_lets_a_checkpoint_have_are_no_strays(saved):
    before = transformers.BertModel.from_pretrained(saved)
    ids = torch.arange(512)[None]
    change_tensors(saved, lambda tensors: tensors.update({"embeddings.position_ids": ids}))
    assert_same_outputs(before, transformers.BertModel.from_pretrained(saved))


def test_names_that_the_caller_translates_are_no_strays(saved):
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("pooler.")]:
            tensors[name.replace("pooler", "swimmer")] = tensors.pop(name)

    model = transformers.BertModel.from_pretrained(saved)
    change_tensors(saved, rename)
    again = transformers.BertModel.from_pretrained(saved, key_mapping={"^swimmer": "pooler"})
    assert_same_outputs(model, again)
    again.save_pretrained(saved)
    assert "swimmer.dense.weight" in load_file(saved / "model.safetensors")  # the checks left no traces
    with pytest.raises(CheckpointError, match=r"swimmer\.dense"):
        transformers.BertModel.from_pretrained(saved)


def test_a_dense_folder_with_biases_that_the_class_lacks_is_refused(tmp_path):
    """Without them its outputs would be others: transformers passes over what it does not expect."""
    model = llama().eval()
    data = [{"input_ids": torch.randint(99, (4, 16))} for _ in range(4)]
    lowrank.compress(model, rank=8, data=data, add_bias=True)
    lowrank.save(model, tmp_path / "small")
    lowrank.load(tmp_path / "small")
    lowrank.save(lowrank.decompress(model), tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"has the tensor model\.layers\.0\.\w+\.\w+\.bias, but Llama"):
        lowrank.load(tmp_path / "dense")

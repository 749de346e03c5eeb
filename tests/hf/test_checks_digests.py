"""A changed number, name or config of a folder is refused, whoever loads it."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from saved_models import (
    FAMILIES,
    LAYER,
    assert_same_outputs,
    built,
    by_transformers,
    change_tensors,
    flip,
    mixtral,
    small,
    vit,
)
from torch import Tensor

import lowrank
from lowrank import CheckpointError


@pytest.mark.parametrize("name", [f"{LAYER}.up.weight", "embeddings.word_embeddings.weight"])
def test_a_changed_number_is_refused_by_name(name, with_digests):
    change_tensors(with_digests, lambda tensors: flip(tensors, name))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the tensor {name} is not the one"):
        lowrank.load(with_digests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update(backdoor=torch.zeros(2)), r"safetensors: has the tensor backdoor"),
        (lambda tensors: tensors.pop("pooler.dense.bias"), r"small: lacks the tensor pooler\.dense\.bias"),
    ],
    ids=["extra", "missing"],
)
def test_digests_cover_the_names_too(change, message, with_digests):
    change_tensors(with_digests, change)
    with pytest.raises(CheckpointError, match=message):
        lowrank.load(with_digests)


@pytest.mark.parametrize("digests", [3, ["a"], {"a": 1}], ids=repr)
def test_malformed_digests_are_refused(digests, with_digests):
    file = with_digests / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["tensors"] = digests
    config["quantization_config"].pop("digest")
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r'config\.json: "tensors" must map'):
        lowrank.load(with_digests)


@pytest.mark.parametrize("build", [vit, mixtral], ids=["vit", "mixtral"])
def test_digests_follow_the_names_in_the_file(build, tmp_path):
    model = small(build)
    lowrank.save(model, tmp_path / "small")
    digests = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["tensors"]
    assert digests.keys() == load_file(tmp_path / "small" / "model.safetensors").keys()
    assert_same_outputs(model, lowrank.load(tmp_path / "small"))


@pytest.mark.parametrize(
    "load", [lowrank.load, transformers.BertModel.from_pretrained], ids=["lowrank", "hf"]
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one-file", "shards"])
def test_save_pretrained_over_a_folder_with_digests_leaves_none(load, shard, with_digests):
    model = load(with_digests)
    with torch.no_grad():
        model.pooler.dense.bias.add_(1)
    (with_digests / "model.safetensors").unlink()
    model.save_pretrained(with_digests, max_shard_size=shard)
    assert "tensors" not in json.loads((with_digests / "config.json").read_text())["quantization_config"]
    assert_same_outputs(model, lowrank.load(with_digests))


@pytest.mark.parametrize("load", [lowrank.load, by_transformers], ids=["lowrank", "hf"])
@pytest.mark.parametrize("name", [f"{LAYER}.up.weight", "embeddings.LayerNorm.bias"])
def test_both_loaders_refuse_a_changed_number(load, name, with_digests):
    change_tensors(with_digests, lambda tensors: flip(tensors, name))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the tensor {name} is not the one"):
        load(with_digests)


@pytest.mark.parametrize("load", [lowrank.load, by_transformers], ids=["lowrank", "hf"])
@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 2}, {"hidden_act": "relu"}, {"architectures": ["BertForMaskedLM"]}],
    ids=lambda change: next(iter(change)),
)
def test_both_loaders_refuse_a_changed_config(load, change, with_digests):
    file = with_digests / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"small/config\.json: is not as it was saved"):
        load(with_digests)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    "name", ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight", "pooler.dense.bias"]
)
def test_nan_in_any_parameter_is_refused_by_name(name, value, saved):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    change_tensors(saved, spoil)
    with pytest.raises(CheckpointError, match=rf"small: the tensor {name} has NaN or infinite elements"):
        by_transformers(saved)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "dangling-link"])
def test_what_is_no_file_is_refused_without_waiting(kind, file, with_digests):
    place = with_digests / file
    place.unlink()
    make = {"pipe": os.mkfifo, "directory": Path.mkdir, "dangling-link": lambda p: p.symlink_to("nowhere")}
    make[kind](place)
    with pytest.raises(CheckpointError, match="small"):
        lowrank.load(with_digests)


def test_links_to_files_elsewhere_are_followed_as_in_the_cache_of_the_hub(with_digests, tmp_path):
    (tmp_path / "blobs").mkdir()
    for file in list(with_digests.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    for load in (lowrank.load, by_transformers):
        assert_same_outputs(small(), load(with_digests))


def test_a_config_that_transformers_cannot_use_is_a_checkpoint_error(tmp_path):
    folder = lowrank.save(built(FAMILIES["bert"]), tmp_path / "dense")
    for change in ({"hidden_size": "many"}, {"architectures": 3}, {"vocab_size": -1}, {"hidden_size": 2**70}):
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="dense"):
            lowrank.load(folder)
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config))


def test_a_config_with_layers_without_end_is_refused_at_once(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match=r"layers is 1,000,000,000, but the files hold \d+ tensors"):
        lowrank.load(tmp_path)

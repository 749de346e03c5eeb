"""`LowRankConfig`: a request to `from_pretrained`, checked when it is made; whether digests are compared."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from saved_models import (
    FAMILIES,
    LAYER,
    assert_same_outputs,
    built,
    by_transformers,
    change_tensors,
    factorized,
    flip,
    small,
    structure,
)

import lowrank
from lowrank import BudgetError, CheckpointError, LowRankConfig, LowRankError
from lowrank.hf import checks


@pytest.mark.parametrize(
    "budget", [{"rank": 8}, {"keep": 0.5}, {"error": 0.5}], ids=["rank", "keep", "error"]
)
def test_a_quantization_config_compresses_a_dense_checkpoint(budget, tmp_path):
    dense = built(FAMILIES["bert-sequence-classification"])
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=LowRankConfig(**budget))
    expected = lowrank.compress(dense, **budget)
    assert structure(model) == structure(expected)
    assert_same_outputs(model, expected)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "small")
    assert_same_outputs(model, type(model).from_pretrained(tmp_path / "small"))


def test_a_quantization_config_takes_patterns(tmp_path):
    built(FAMILIES["bert"]).save_pretrained(tmp_path)
    config = LowRankConfig(
        rank={"*.query": 4, "*.key": 6}, targets=["*.query", "*.key"], ignore=["encoder.layer.1.*"]
    )
    model = transformers.AutoModel.from_pretrained(tmp_path, quantization_config=config)
    attention = "encoder.layer.0.attention.self."
    assert factorized(model) == [attention + "query", attention + "key"]
    assert [model.get_submodule(name).rank for name in factorized(model)] == [4, 6]


def test_a_quantization_config_takes_a_size(tmp_path):
    built(FAMILIES["bert"]).save_pretrained(tmp_path)
    dense = sum(p.numel() for p in built(FAMILIES["bert"]).parameters()) * 4
    config = LowRankConfig(max_bytes=int(0.95 * dense))
    model = transformers.AutoModel.from_pretrained(tmp_path, quantization_config=config)
    assert sum(p.numel() for p in model.parameters()) * 4 <= 0.95 * dense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one budget"),
        ({"rank": 8, "keep": 0.5}, "exactly one budget"),
        ({"rank": 0}, "0 is not positive"),
        ({"keep": 1.5}, "strictly between 0 and 1"),
    ],
    ids=["none", "two", "rank-0", "keep-1.5"],
)
def test_a_malformed_request_is_refused_when_the_config_is_made(arguments, message):
    with pytest.raises(LowRankError, match=message):
        LowRankConfig(**arguments)


def test_a_request_that_fits_no_layer_is_an_error_when_loading(tmp_path):
    built(FAMILIES["bert"]).save_pretrained(tmp_path)
    with pytest.raises(LowRankError, match=r'"\*\.q_proj" matches none'):
        transformers.AutoModel.from_pretrained(
            tmp_path, quantization_config=LowRankConfig(rank=8, targets=["*.q_proj"])
        )


def test_the_config_of_a_compressed_model_is_json_and_can_be_printed(tmp_path):
    model = small()
    assert '"quant_method": "lowrank"' in str(model.config)
    was_copy = copy.deepcopy(model.config)
    assert was_copy.to_dict() == model.config.to_dict()
    json.dumps(model.config.to_diff_dict())


def saved_again(folder: Path, section: dict) -> None:
    """Write the fields into the folder's config, with a digest that fits."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(section)
    tensors = config["quantization_config"]["tensors"]
    config["quantization_config"].pop("digest")
    file.write_text(json.dumps(checks.with_digests(config, tensors)))


def test_verification_can_be_turned_off(with_digests):
    before = by_transformers(with_digests).get_submodule(LAYER).up.weight
    change_tensors(with_digests, lambda tensors: flip(tensors, f"{LAYER}.up.weight"))
    with pytest.warns(UserWarning, match="verify"):
        model = by_transformers(with_digests, quantization_config=LowRankConfig(verify=False))
    after = model.get_submodule(LAYER).up.weight
    assert not torch.equal(before, after)
    model.save_pretrained(with_digests)
    assert set(json.loads((with_digests / "config.json").read_text())["quantization_config"]) == {
        "how_to_load",
        "plan",
        "quant_method",
    }


def test_verification_can_be_asked_for(with_digests):
    change_tensors(with_digests, lambda tensors: flip(tensors, f"{LAYER}.up.weight"))
    config = LowRankConfig(verify=True)
    with (
        pytest.warns(UserWarning, match="verify"),
        pytest.raises(CheckpointError, match="is not the one that was saved"),
    ):
        by_transformers(with_digests, quantization_config=config)


def test_a_folder_cannot_turn_verification_off_itself(with_digests):
    saved_again(with_digests, {"verify": False})
    with pytest.raises(CheckpointError, match=r"config\.json: LowRankConfig: give a budget, a plan"):
        by_transformers(with_digests)


def test_verify_is_no_request_for_a_dense_folder(tmp_path):
    built(FAMILIES["bert"]).save_pretrained(tmp_path)
    with pytest.raises(BudgetError, match="exactly one budget"):
        by_transformers(tmp_path, quantization_config=LowRankConfig(verify=False))

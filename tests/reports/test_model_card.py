"""A saved folder says what it is and how to load it, and never touches a README of the user's."""

import json
import re

import pytest
import torch
import transformers
import yaml
from model_cards import card_of, save
from torch import nn

import lowrank


def header_of(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_a_compressed_checkpoint_has_a_card_with_its_sizes(tiny_bert, tmp_path):
    dense_parameters = sum(p.numel() for p in tiny_bert.parameters())
    lowrank.compress(tiny_bert, rank=8)
    save(tiny_bert, tmp_path)
    text, parameters = card_of(tmp_path), sum(p.numel() for p in tiny_bert.parameters())
    assert header_of(text) == {"library_name": "transformers", "tags": ["lowrank", "compression"]}
    assert "12 of 13 layers factorized (`rank=8`)." in text
    assert f"| parameters | {dense_parameters:,} | {parameters:,} |" in text
    size = (tmp_path / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB |" in text
    assert "pip install torch-lowrank" in text


def test_the_card_counts_quantized_weights_by_scheme(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8, quantize="int8")
    save(tiny_bert, tmp_path)
    coded = sum(
        isinstance(m, lowrank.QuantizedLinear | lowrank.QuantizedEmbedding) for m in tiny_bert.modules()
    )
    assert f", {coded} weights quantized to int8 (`rank=8`)." in card_of(tmp_path)


def test_the_code_on_the_card_loads_the_folder(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8)
    save(tiny_bert, tmp_path)
    code = re.search(r"```python\n(.*?)```", card_of(tmp_path), re.DOTALL)[1]
    namespace: dict = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)), namespace)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before, after = tiny_bert(ids), namespace["model"].eval()(ids)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)


def test_the_code_on_the_card_of_a_module_loads_the_folder(mlp, tmp_path):
    lowrank.save(lowrank.compress(mlp, rank=8), tmp_path)
    text = card_of(tmp_path)
    assert header_of(text) == {"library_name": "lowrank", "tags": ["lowrank", "compression"]}
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    fresh = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    given = code.replace("path/to/this/folder", str(tmp_path)).replace("Sequential(...)", "fresh")
    namespace: dict = {"fresh": fresh}
    exec(given, namespace)
    x = torch.randn(3, 64)
    assert torch.equal(namespace["model"].eval()(x), mlp(x))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", True),
        ("/home/kurt/models/mine", False),
        ("../mine", False),
        ("mine", False),
    ],
)
def test_the_base_model_is_named_if_it_is_one_of_the_hub(name, known, tiny_bert, tmp_path):
    tiny_bert.config._name_or_path = name
    lowrank.compress(tiny_bert, rank=8)
    save(tiny_bert, tmp_path)
    assert header_of(card_of(tmp_path)).get("base_model") == (name if known else None)
    assert known or "kurt" not in card_of(tmp_path)


def test_a_dense_model_has_no_card_and_loses_that_of_an_older_save(tiny_bert, tmp_path):
    save(tiny_bert, tmp_path)
    assert not (tmp_path / "README.md").exists()
    lowrank.compress(tiny_bert, rank=8)
    save(tiny_bert, tmp_path)
    assert (tmp_path / "README.md").exists()
    save(lowrank.decompress(tiny_bert), tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("write", [save, lambda model, folder: model.save_pretrained(folder)])
def test_the_config_says_how_to_load_the_folder(tiny_bert, tmp_path, write):
    lowrank.compress(tiny_bert, rank=8)
    write(tiny_bert, tmp_path)
    section = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["how_to_load"] == "import lowrank before from_pretrained: pip install torch-lowrank"
    assert next(iter(section)) == "how_to_load"  # the first line that is seen of the section


def test_save_pretrained_stays_transformers_own(tiny_bert, tmp_path):
    code = transformers.PreTrainedModel.save_pretrained.__code__
    assert code.co_filename == transformers.modeling_utils.__file__
    lowrank.compress(tiny_bert, rank=8).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_model_inside_of_a_module_gets_its_own_card(tiny_bert, tmp_path):
    outer = nn.ModuleDict({"encoder": tiny_bert, "head": nn.Linear(64, 2)})
    lowrank.compress(outer, rank=8)
    save(outer["encoder"], tmp_path)
    assert "BertModel, compressed by lowrank" in card_of(tmp_path)

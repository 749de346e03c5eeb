"""Weights become integers in place: factors, tables and dense layers alike."""

import copy
import json

import pytest
import torch
from bert_outputs import outputs, quantized_modules
from closeness import agreement
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import Plan, QuantizedEmbedding, QuantizedLinear, compress, quantize
from lowrank.errors import (
    CheckpointError,
)


def test_dense_layers_factors_and_embeddings_are_coded_alike(tiny_bert):
    compress(tiny_bert, rank=16, targets=["*.query"])
    before = outputs(tiny_bert)
    quantize(tiny_bert)
    names = quantized_modules(tiny_bert)
    assert {"encoder.layer.0.attention.self.query.down", "encoder.layer.0.attention.self.query.up"} <= set(
        names
    )
    assert isinstance(names["encoder.layer.0.attention.self.key"], QuantizedLinear)
    assert isinstance(names["embeddings.word_embeddings"], QuantizedEmbedding)
    assert "pooler.dense" not in names  # a head
    assert agreement(outputs(tiny_bert), before) > 0.999


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_statistics_make_it_better(tiny_bert, bert_stats, scheme):
    small = compress(tiny_bert, rank=32, stats=bert_stats)
    before = outputs(small)
    plain, calibrated = (
        (outputs(quantize(copy.deepcopy(small), scheme, stats=known, targets=["encoder.*"])) - before).norm()
        for known in (None, bert_stats)
    )
    assert calibrated < 0.9 * plain


def test_gpt2_and_shared_factors(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    before = outputs(model)
    quantize(model)
    assert quantized_modules(model)["transformer.h.0.attn.c_attn"].layer_type == "conv1d"
    assert agreement(outputs(model), before) > 0.999
    model.save_pretrained(tmp_path / "gpt2")
    assert torch.equal(outputs(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()), outputs(model))

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    llama = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(4)]
    stats = lowrank.calibrate(llama, data)
    compress(llama, rank=16, stats=stats, share="inputs")
    before = outputs(llama)
    quantize(llama, stats=stats)
    assert "model.layers.0.self_attn.q_proj.down" in quantized_modules(
        llama
    )  # once for the layers that it serves
    assert "model.layers.0.self_attn.k_proj.down" not in quantized_modules(llama)
    assert (
        quantized_modules(llama)["model.layers.0.mlp.down_proj.down"].input_shift is None
    )  # no bias to take it up
    assert agreement(outputs(llama), before) > 0.999
    llama.save_pretrained(tmp_path / "llama")
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()), outputs(llama))


@pytest.mark.parametrize("change", [{"smooth_scale": True}, {"input_shift": True}], ids=str)
def test_a_coded_table_reads_no_features(mlp, tmp_path, change):
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
    skeleton = copy.deepcopy(model)
    lowrank.save(quantize(model), tmp_path / "small")
    file = tmp_path / "small" / "lowrank.json"
    structure = json.loads(file.read_text())
    structure["plan"]["quantized"][0].update(change)
    file.write_text(json.dumps(structure))
    with pytest.raises(CheckpointError, match=r"shift its inputs|does not fit"):
        lowrank.load(tmp_path / "small", model=skeleton)
    assert type(skeleton[0]) is nn.Embedding


def test_a_missing_bias_is_not_made_up(tiny_bert, tmp_path):
    from transformers import BertForSequenceClassification

    quantize(tiny_bert)
    tiny_bert.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.0.output.dense.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    for cls in (type(tiny_bert), BertForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.output\.dense\.bias"):
            cls.from_pretrained(tmp_path)


def test_factors_that_are_fitted_block_by_block_are_coded_last(tiny_bert):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(8)]
    uncoded = compress(copy.deepcopy(tiny_bert), rank=16, data=data, sequential=True)
    small = compress(tiny_bert, rank=16, data=data, sequential=True, quantize="int8")
    assert "encoder.layer.0.output.dense.up" in quantized_modules(small)
    assert "fitted anew" in str(Plan.from_dict(small.config.quantization_config.plan))
    assert agreement(outputs(small), outputs(uncoded)) > 0.999


def test_given_ranks_are_rounded_to_whole_groups():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256))
    decided = lowrank.plan(model, rank={"0": 100, "1": 5, "2": 64}, quantize="int4")
    assert [layer.rank for layer in decided] == [96, 32, 64]
    assert decided["0"].reason == "100 as asked, in whole groups of 32"
    assert decided["2"].reason == "as asked"

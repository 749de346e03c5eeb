"""Narrower transformers models are saved and loaded; with one width, by their own config alone."""

import copy
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from allocations import LargestTensor
from torch import nn

import lowrank

transformers = pytest.importorskip("transformers")

IDS = torch.arange(96).reshape(4, 24)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


def bert(cls="BertModel"):
    return getattr(transformers, cls)(transformers.BertConfig(**SIZES))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bart():
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=99,
        max_position_embeddings=64,
    )
    return transformers.BartModel(config)


FAMILIES = {
    "bert": (bert, ["intermediate_size"]),
    "bert-masked-lm-tied": (lambda: bert("BertForMaskedLM"), ["intermediate_size"]),
    "llama-gated": (llama, ["intermediate_size"]),
    "gpt2-conv1d-tied": (gpt2, ["n_inner"]),
    "bart-two-widths": (bart, ["encoder_ffn_dim", "decoder_ffn_dim"]),
}


DATA = [{"input_ids": IDS.roll(i) % 99} for i in range(4)]


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def narrowed(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lowrank.errors.ReachWarning)  # most of a tiny model are embeddings
        return lowrank.compress(
            model, keep=0.5, data=DATA, forms=["neurons"], allocation="uniform", **options
        )


def narrowed_unlike(model):
    """Remove half of the neurons, and eight more of those in the last block."""
    stats = lowrank.calibrate(model, DATA)
    options = {"allocation": "uniform", "stats": stats, "inputs": DATA[0]}
    plan = lowrank.plan(model, keep=0.5, forms=["neurons"], **options)
    last = [layer for layer in plan if layer.kept_inputs][-1]
    writers = [replace(x, kept_outputs=last.kept_inputs - 8) for x in plan if x.feeds == last.name]
    layers = [replace(last, kept_inputs=last.kept_inputs - 8), *writers]
    return lowrank.apply(model, plan.with_layers({layer.name: layer for layer in layers}), stats)


def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_width_for_all_is_a_smaller_model_of_the_same_class(family, tmp_path):
    build, fields = FAMILIES[family]
    model = narrowed(seeded(build))
    width = 64 if family.startswith("gpt2") else 32
    assert [getattr(model.config, field) for field in fields] == [width] * len(fields)
    lowrank.save(model, tmp_path / "small")
    assert "quantization_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
    loaded = lowrank.load(tmp_path / "small")
    assert type(loaded) is type(model) and torch.equal(outputs(loaded), outputs(model))


def test_a_folder_of_one_width_loads_without_lowrank(tmp_path):
    model = narrowed(seeded(bert))
    model.save_pretrained(tmp_path / "small")
    torch.save(outputs(model), tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers\n"
        "sys.modules['lowrank'] = None\n"
        f"model = transformers.AutoModel.from_pretrained({str(tmp_path / 'small')!r}).eval()\n"
        "ids = torch.arange(96).reshape(4, 24)\n"
        f"print(torch.equal(model(input_ids=ids)[0], torch.load({str(tmp_path / 'expected.pt')!r})))"
    )
    environment = {**os.environ, "LOWRANK_SETUP": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_of_their_own_are_held_by_the_plan_in_the_config(family, tmp_path):
    small = narrowed_unlike(seeded(FAMILIES[family][0]))
    plan = lowrank.hf.models.recorded(small)
    widths = [layer.kept_inputs for layer in plan if layer.feeds is None and layer.is_narrower]
    assert len(set(widths)) == 2
    small.save_pretrained(tmp_path / "small")
    loaded = type(small).from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(loaded), outputs(small))
    assert lowrank.hf.models.recorded(loaded).layers == plan.layers


def test_loading_makes_no_dense_weight(tmp_path):
    sizes = {**SIZES, "intermediate_size": 512, "max_position_embeddings": 64}
    small = narrowed_unlike(seeded(lambda: transformers.BertModel(transformers.BertConfig(**sizes))))
    small.save_pretrained(tmp_path / "small")
    with LargestTensor() as largest:
        loaded = transformers.BertModel.from_pretrained(tmp_path / "small")
    widest = max(layer.output.dense.in_features for layer in loaded.encoder.layer)
    assert largest.elements == 32 * widest < 32 * 512


def test_a_head_is_loaded_over_a_narrower_base_model(tmp_path):
    small = narrowed_unlike(seeded(bert))
    small.save_pretrained(tmp_path / "small")
    head = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(head.bert), outputs(small))


def test_a_config_that_cannot_say_the_width_stays(tmp_path):
    model = narrowed(seeded(bert), ignore=["encoder.layer.1.*"])
    assert model.config.intermediate_size == 64
    lowrank.save(model, tmp_path / "small")
    assert torch.equal(outputs(lowrank.load(tmp_path / "small")), outputs(model))


def test_within_another_module_the_config_stays(tmp_path):
    def built():
        return nn.ModuleDict({"encoder": seeded(bert)})

    whole = built()
    whole.forward = lambda input_ids: whole["encoder"](input_ids=input_ids)[0]
    narrowed(whole)
    assert whole["encoder"].config.intermediate_size == 64
    lowrank.save(whole, tmp_path / "whole")
    loaded = lowrank.load(tmp_path / "whole", built())
    assert torch.equal(outputs(loaded["encoder"]), outputs(whole["encoder"]))


def test_a_copy_saves_as_the_original_does(tmp_path):
    small = copy.deepcopy(narrowed_unlike(seeded(bert)))
    small.save_pretrained(tmp_path / "copy")
    assert torch.equal(outputs(transformers.AutoModel.from_pretrained(tmp_path / "copy")), outputs(small))

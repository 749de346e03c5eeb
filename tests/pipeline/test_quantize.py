"""`quantize` and ``compress(quantize=)``: the whole way from a model to a checkpoint and back."""

import copy
import json
import warnings

import pytest
import torch
from closeness import agreement
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import LowRankError, Plan, QuantizedEmbedding, QuantizedLinear, compress, quantize, report
from lowrank.errors import (
    CheckpointError,
    PlanError,
    SchemeError,
    SlowKernelWarning,
    TargetError,
    WeightError,
)
from lowrank.nn import QuantizedModule
from lowrank.nn.integer_matmul import why_no_int4_kernel

IDS = torch.arange(96).reshape(4, 24) % 99


def outputs(model, **inputs):
    with torch.no_grad():
        out = model(**(inputs or {"input_ids": IDS}))
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits


@pytest.fixture
def stats(tiny_bert):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(8)]
    return lowrank.calibrate(tiny_bert, data)


def coded(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def test_dense_layers_factors_and_embeddings_are_coded_alike(tiny_bert):
    compress(tiny_bert, rank=16, targets=["*.query"])
    before = outputs(tiny_bert)
    quantize(tiny_bert)
    names = coded(tiny_bert)
    assert {"encoder.layer.0.attention.self.query.down", "encoder.layer.0.attention.self.query.up"} <= set(
        names
    )
    assert isinstance(names["encoder.layer.0.attention.self.key"], QuantizedLinear)
    assert isinstance(names["embeddings.word_embeddings"], QuantizedEmbedding)
    assert "pooler.dense" not in names  # a head
    assert agreement(outputs(tiny_bert), before) > 0.999


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_statistics_make_it_better(tiny_bert, stats, scheme):
    small = compress(tiny_bert, rank=32, stats=stats)
    before = outputs(small)
    plain, calibrated = (
        (outputs(quantize(copy.deepcopy(small), scheme, stats=known, targets=["encoder.*"])) - before).norm()
        for known in (None, stats)
    )
    assert calibrated < 0.9 * plain


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("known", [False, True], ids=["plain", "calibrated"])
def test_checkpoints_give_the_same_bits_and_the_reported_bytes(tiny_bert, stats, scheme, known, tmp_path):
    small = compress(tiny_bert, rank=32, stats=stats if known else None, quantize=scheme)
    expected = outputs(small)
    folder = lowrank.save(small, tmp_path / "small")
    assert (folder / "model.safetensors").stat().st_size == report(small).checkpoint_bytes
    assert torch.equal(outputs(type(small).from_pretrained(folder).eval()), expected)
    assert torch.equal(outputs(lowrank.load(folder).eval()), expected)
    stored = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.dense.down.codes"
    assert stored[name].dtype == (torch.int8 if scheme == "int8" else torch.uint8)


def test_a_coded_model_in_half_precision_keeps_its_codes(tiny_bert, tmp_path):
    small = compress(tiny_bert, rank=32, quantize="int8")
    lowrank.save(small, tmp_path / "small")
    half = type(small).from_pretrained(tmp_path / "small", dtype=torch.bfloat16).eval()
    mine, theirs = coded(small), coded(half)
    for name in mine:
        assert torch.equal(mine[name].state_dict()["codes"], theirs[name].state_dict()["codes"])
        assert torch.equal(mine[name].scale, theirs[name].scale)
    assert outputs(half).dtype == torch.bfloat16
    assert agreement(outputs(half).float(), outputs(small)) > 0.999


def test_any_other_module_is_saved_and_loaded(mlp, tmp_path):
    dense = copy.deepcopy(mlp)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    small = quantize(compress(mlp, rank=16), targets=["0"])
    with torch.no_grad():
        expected = small(x)
        folder = lowrank.save(small, tmp_path / "small")
        assert torch.equal(lowrank.load(folder, model=dense)(x), expected)


def test_a_plan_carries_the_codes_out_again(tiny_bert, stats):
    dense = copy.deepcopy(tiny_bert)
    small = compress(tiny_bert, rank=32, stats=stats, quantize="int8")
    done = Plan.from_json(Plan.from_dict(small.config.quantization_config.plan).to_json())
    assert "weights as int8" in str(done)
    with pytest.raises(PlanError, match="pass stats=calibrate"):
        lowrank.apply(copy.deepcopy(dense), done)
    assert torch.equal(outputs(lowrank.apply(dense, done, stats)), outputs(small))


def test_decompress_gives_dense_layers_with_the_same_outputs(tiny_bert, stats):
    small = compress(tiny_bert, rank=32, stats=stats, quantize="int8")
    expected = outputs(small)
    lowrank.decompress(small)
    assert coded(small) == {}
    assert type(small.encoder.layer[0].attention.self.query) is nn.Linear
    assert type(small.embeddings.word_embeddings) is nn.Embedding
    assert agreement(outputs(small), expected) > 0.9995
    assert not hasattr(small.config, "quantization_config")


def test_training_goes_on_through_the_codes(tiny_bert):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(tiny_bert.config)
    compress(model, rank=16, quantize="int8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_recovery_corrects_the_floating_point_parts(tiny_bert):
    dense = copy.deepcopy(tiny_bert)
    small = compress(tiny_bert, rank=16, quantize="int8")
    codes = {name: module.state_dict()["codes"].clone() for name, module in coded(small).items()}
    before = agreement(outputs(small), outputs(dense))
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(12)]
    lowrank.recover(small, dense, data, steps=20, qat=False)
    assert agreement(outputs(small), outputs(dense)) > before
    assert all(torch.equal(coded(small)[name].state_dict()["codes"], kept) for name, kept in codes.items())


def test_the_report_counts_every_byte_and_names_the_kernel(tiny_bert):
    dense_bytes = report(tiny_bert).checkpoint_bytes
    quantize(compress(tiny_bert, rank=16))
    told = report(tiny_bert)
    assert told.checkpoint_bytes_before == pytest.approx(dense_bytes, rel=0.02)
    assert {code.runs_on for code in told.quantized} <= {"lookup", "int8", "dequantized"}
    layer = next(layer for layer in told.layers if layer.name == "encoder.layer.0.output.dense")
    assert (layer.scheme, layer.bytes) == ("int8", 16 * (128 + 64) + 4 * (16 + 64))
    assert "int8" in str(told)
    assert json.loads(told.to_json())["quantized"][0]["scheme"] == "int8"


def test_a_head_that_is_ignored_keeps_its_table_as_it_is(tiny_bert):
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(tiny_bert.config).eval()
    quantize(model, ignore=["*.decoder"])
    assert "bert.embeddings.word_embeddings" not in coded(model)
    assert "bert.embeddings.position_embeddings" in coded(model)


def test_gpt2_and_shared_factors(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    before = outputs(model)
    quantize(model)
    assert coded(model)["transformer.h.0.attn.c_attn"].layer_type == "conv1d"
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
    assert "model.layers.0.self_attn.q_proj.down" in coded(llama)  # once for the layers that it serves
    assert "model.layers.0.self_attn.k_proj.down" not in coded(llama)
    assert coded(llama)["model.layers.0.mlp.down_proj.down"].input_shift is None  # no bias to take it up
    assert agreement(outputs(llama), before) > 0.999
    llama.save_pretrained(tmp_path / "llama")
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()), outputs(llama))


def test_a_base_model_goes_under_a_head(tiny_bert, tmp_path):
    from transformers import BertForSequenceClassification

    small = compress(tiny_bert, rank=32, quantize="int8")
    small.save_pretrained(tmp_path / "small")
    head = BertForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(outputs(head.bert), outputs(small))
    head.save_pretrained(tmp_path / "head")
    base = type(small).from_pretrained(tmp_path / "head").eval()
    assert torch.equal(outputs(base), outputs(small))


def test_a_head_follows_the_codes_of_a_base_checkpoint(tiny_bert, tmp_path):
    from transformers import BertForMaskedLM

    quantize(tiny_bert).save_pretrained(tmp_path)
    head = BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert head.cls.predictions.decoder.owner is head.bert.embeddings.word_embeddings
    assert torch.equal(outputs(head.bert), outputs(tiny_bert))


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ({"scheme": "int3"}, WeightError, r"known schemes are 'int8' and 'int4'"),
        ({"scheme": "int4", "group_size": 48}, WeightError, r"query: rows of 64 .* groups of 48"),
        ({"targets": ["*.qury"]}, TargetError, r"qury"),
        ({"targets": "encoder.*"}, TargetError, r"give a list of patterns"),
        ({"ignore": ["*"]}, LowRankError, r"No weight of BertModel is left"),
    ],
)
def test_bad_requests_leave_the_model_as_it_was(tiny_bert, request_, kind, message):
    with pytest.raises(kind, match=message):
        quantize(tiny_bert, **request_)
    assert coded(tiny_bert) == {}


def test_statistics_of_another_model_are_refused(tiny_bert, stats):
    with torch.no_grad():
        tiny_bert.encoder.layer[1].output.dense.weight.mul_(2)
    with pytest.raises(lowrank.StatsError, match=r"encoder\.layer\.1\.output\.dense"):
        quantize(tiny_bert, stats=stats)
    assert coded(tiny_bert) == {}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_compiling_and_exporting_a_model_that_has_run(tiny_bert, scheme):
    quantize(tiny_bert, scheme)
    expected = outputs(tiny_bert)
    with torch.no_grad():
        exported = torch.export.export(tiny_bert, (), {"input_ids": IDS}).module()
        assert agreement(exported(input_ids=IDS).last_hidden_state, expected) > 0.999
        compiled = torch.compile(tiny_bert, backend="aot_eager")
        assert agreement(compiled(input_ids=IDS).last_hidden_state, expected) > 0.999


def test_from_pretrained_compresses_and_codes(tiny_bert, tmp_path):
    tiny_bert.save_pretrained(tmp_path / "dense")
    config = lowrank.LowRankConfig(rank=16, quantize="int8")
    loaded = type(tiny_bert).from_pretrained(tmp_path / "dense", quantization_config=config).eval()
    assert torch.equal(outputs(loaded), outputs(compress(tiny_bert, rank=16, quantize="int8")))


def test_resizing_a_coded_embedding_is_refused(tiny_bert):
    quantize(tiny_bert)
    with pytest.raises(LowRankError, match=r"Call lowrank\.decompress\(model\) first, resize"):
        tiny_bert.resize_token_embeddings(120)
    lowrank.decompress(tiny_bert)
    assert tiny_bert.resize_token_embeddings(120).num_embeddings == 120


def test_quantizing_twice_is_refused_and_mixing_is_not(tiny_bert):
    quantize(tiny_bert, "int4", targets=["embeddings.*"])
    quantize(tiny_bert, "int8")
    schemes = {module.scheme.name for module in coded(tiny_bert).values()}
    assert schemes == {"int4", "int8"}
    with pytest.raises(LowRankError, match="quantized already"):
        quantize(tiny_bert, "int8")
    with pytest.raises(TargetError, match=r"it is quantized already \(int8\)"):
        quantize(tiny_bert, targets=["encoder.layer.0.attention.self.query"])
    with pytest.raises(LowRankError, match="quantized already"):
        compress(tiny_bert, keep=0.5)


def test_nan_is_named_before_anything_changes(tiny_bert):
    with torch.no_grad():
        tiny_bert.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"encoder\.layer\.1\.output\.dense: .*NaN"):
        quantize(tiny_bert)
    assert coded(tiny_bert) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, n: t | {f"{n}.codes": t[f"{n}.codes"][:, :-1].contiguous()},
            r"codes has shape .* must have",
        ),
        (lambda t, n: t | {f"{n}.scale": t[f"{n}.scale"][:-1].contiguous()}, r"scale has shape .* must have"),
        (lambda t, n: t | {f"{n}.codes": t[f"{n}.codes"].float()}, r"codes is stored as F32.* must be I8"),
        (lambda t, n: t | {f"{n}.scale": t[f"{n}.scale"] * float("nan")}, r"scale has NaN"),
        (lambda t, n: {k: v for k, v in t.items() if k != f"{n}.codes"}, r"lacks the tensor .*codes"),
        (lambda t, n: {k: v for k, v in t.items() if k != f"{n}.scale"}, r"lacks the tensor .*scale"),
    ],
)
def test_a_checkpoint_whose_codes_and_scales_disagree(tiny_bert, tmp_path, change, message):
    small = compress(tiny_bert, rank=32, quantize="int8")
    small.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file), "encoder.layer.0.output.dense.up"), file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        type(small).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "int3"},
        {"rows": 63},
        {"columns": 0},
        {"layer_type": "embedding"},
        {"name": "encoder.nothing"},
        {"group_size": 32},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_config_with_damaged_codes_is_refused(tiny_bert, tmp_path, change):
    small = compress(tiny_bert, rank=32, quantize="int8")
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    codes = config["quantization_config"]["plan"]["quantized"]
    next(code for code in codes if code["name"] == "encoder.layer.0.output.dense.up").update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json|model\.safetensors"):
        type(small).from_pretrained(tmp_path)


def shared_tables():
    return nn.Sequential(nn.Linear(64, 64), nn.Embedding(10, 64, max_norm=1.0))


def test_a_failed_call_changes_nothing():
    model = nn.Sequential(nn.Linear(10, 128), nn.Linear(128, 128))
    with pytest.raises(WeightError, match=r"0: rows of 10 elements"):
        compress(model, rank=32, quantize="int4")
    assert type(model[1]) is nn.Linear
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(WeightError, match=r"0: .*infinite"):
        compress(model, rank=32, quantize="int8")
    assert type(model[1]) is nn.Linear
    embeddings = shared_tables()
    with pytest.raises(TargetError, match="1: this weight cannot be quantized: it has a max_norm"):
        quantize(embeddings, targets=["1"])
    assert type(quantize(embeddings)[1]) is nn.Embedding


def test_a_plan_without_its_statistics_is_refused_before_anything_changes(tiny_bert, stats):
    small = compress(copy.deepcopy(tiny_bert), rank=16)
    done = Plan.from_dict(quantize(small, stats=stats).config.quantization_config.plan)
    assert done.metric == "weight"
    with pytest.raises(PlanError, match="pass stats=calibrate"):
        lowrank.apply(tiny_bert, done)
    assert lowrank.plan(tiny_bert, rank=8).factorized  # dense still
    with pytest.raises(PlanError, match="quantizes this weight twice"):
        Plan.from_dict(
            done.to_dict() | {"quantized": [*done.to_dict()["quantized"], done.to_dict()["quantized"][0]]}
        )


def test_an_interrupt_leaves_a_model_that_can_be_saved(tiny_bert, stats, tmp_path, monkeypatch):
    from lowrank.surgery import replacement

    dense, calls, real = copy.deepcopy(tiny_bert), [], replacement.quantized_module

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(replacement, "quantized_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_bert, stats=stats)
    assert len(coded(tiny_bert)) == 4
    assert agreement(outputs(tiny_bert), outputs(dense)) > 0.999
    tiny_bert.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(tiny_bert).from_pretrained(tmp_path).eval()), outputs(tiny_bert))


def test_a_layer_that_is_called_down_is_not_mistaken_for_a_factor():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(64, 32)

        def forward(self, x):
            return self.down(x)

    model = nn.Sequential(Block(), nn.Linear(32, 32))
    stats = lowrank.calibrate(model, [torch.randn(64, 64) for _ in range(4)])
    quantize(model, stats=stats)
    assert model[0].down.smooth_scale is not None
    assert model[0].down.input_shift is not None


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


@pytest.mark.parametrize(("part", "dtype"), [("codes", torch.float32), ("scale", torch.int64)])
def test_codes_of_another_dtype_are_refused_whatever_the_digests_say(tmp_path, part, dtype):
    from lowrank.files.integrity import digest_of

    model = nn.Sequential(nn.Linear(64, 64))
    skeleton = copy.deepcopy(model)
    lowrank.save(quantize(model), tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    tensors[f"0.{part}"] = tensors[f"0.{part}"].to(dtype)
    save_file(tensors, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "small" / "lowrank.json"
    structure = json.loads(file.read_text())
    structure["tensors"][f"0.{part}"] = digest_of(tensors[f"0.{part}"])
    file.write_text(json.dumps(structure))
    with pytest.raises(CheckpointError, match=rf"0\.{part} is .*; its scheme needs"):
        lowrank.load(tmp_path / "small", model=skeleton)
    assert type(skeleton[0]) is nn.Linear


def test_factors_that_are_fitted_block_by_block_are_coded_last(tiny_bert):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(8)]
    uncoded = compress(copy.deepcopy(tiny_bert), rank=16, data=data, sequential=True)
    small = compress(tiny_bert, rank=16, data=data, sequential=True, quantize="int8")
    assert "encoder.layer.0.output.dense.up" in coded(small)
    assert "fitted anew" in str(Plan.from_dict(small.config.quantization_config.plan))
    assert agreement(outputs(small), outputs(uncoded)) > 0.999


def narrow():
    """Two layers, of which one has a number of outputs that no int4 kernel takes."""
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 20))


def test_int4_without_a_kernel_warns_once_or_refuses_as_was_chosen():
    x = torch.randn(3, 64)
    with pytest.warns(SlowKernelWarning) as caught:
        small = quantize(narrow(), "int4", targets=["*"])
    (told,) = [w for w in caught if w.category is SlowKernelWarning]
    kernel = why_no_int4_kernel(64, 64, 32, torch.device("cpu")) is None
    assert f"{1 if kernel else 2} int4 weights of linear layers have to be dequantized" in str(told.message)
    assert "since the kernel wants outputs in multiples of 16 (the first: 1)" in str(told.message)
    assert small[1].runs_on() == "dequantized"
    untouched = narrow()
    with pytest.raises(SchemeError, match=r"dequantized at every call.*on_missing_kernel='allow'"):
        quantize(untouched, "int4", targets=["*"], on_missing_kernel="refuse")
    assert type(untouched[1]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(narrow(), "int4", targets=["*"], on_missing_kernel="allow")(x)
        quantize(narrow(), "int8", targets=["*"], on_missing_kernel="refuse")(x)
    with pytest.raises(
        SchemeError, match=r"on_missing_kernel='quietly': give one of 'warn', 'refuse', 'allow'"
    ):
        quantize(narrow(), "int4", targets=["*"], on_missing_kernel="quietly")


def test_factors_without_a_kernel_are_refused_before_they_are_made():
    model = nn.Sequential(nn.Linear(128, 136), nn.Linear(136, 128))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(SchemeError, match=r"1 int4 weights .* since .* \(the first: 0.up\)"):
        compress(model, rank=32, quantize="int4", on_missing_kernel="refuse", ignore=["1"])
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_there_is_nothing_to_calibrate_in_a_coded_model():
    model = quantize(nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(lowrank.errors.TargetError, match=r"0: is quantized already \(int8\); decompress"):
        lowrank.calibrate(model, [torch.randn(4, 32)])


def test_layers_that_read_constants_are_coded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    nn.init.zeros_(model[0].weight)  # so that the last layer reads the same at each token
    inputs = torch.randn(50, 32)
    expected = model(inputs).detach()
    stats = lowrank.calibrate(model, [inputs])
    small = compress(copy.deepcopy(model), rank=4, stats=stats, quantize="int8")
    assert (small(inputs) - expected).norm() < 0.05 * expected.norm()
    for scheme in ("int8", "int4"):
        coded = quantize(copy.deepcopy(model), scheme, stats=stats)
        assert (coded(inputs) - expected).norm() < 0.05 * expected.norm()


def test_given_ranks_are_rounded_to_whole_groups():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256))
    decided = lowrank.plan(model, rank={"0": 100, "1": 5, "2": 64}, quantize="int4")
    assert [layer.rank for layer in decided] == [96, 32, 64]
    assert decided["0"].reason == "100 as asked, in whole groups of 32"
    assert decided["2"].reason == "as asked"


@pytest.mark.parametrize("size", [1e12, 1e-12])
def test_int4_beyond_the_range_of_its_scales_is_refused_by_the_plan(size):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight.data *= size
    with pytest.raises(WeightError, match=r"^2(\.down)?: its largest element is .* Use int8, or ignore"):
        lowrank.plan(model, keep=0.9, quantize="int4", group_size=16)
    decided = lowrank.plan(model, max_bytes=8000, quantize="auto")
    assert {code.scheme for code in decided.quantized if code.name.startswith("2")} <= {"int8"}
    lowrank.apply(model, decided, on_missing_kernel="allow")


def test_a_group_larger_than_any_row_is_refused():
    with pytest.raises(SchemeError, match="no row has so many elements"):
        lowrank.plan(nn.Sequential(nn.Linear(64, 64)), keep=0.5, quantize="int4", group_size=10**30)


def test_a_plan_is_refused_where_a_weight_to_be_quantized_is_not_finite():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(WeightError, match=r"^0: The weight has 4,096 of 4,096 values that are NaN"):
        lowrank.plan(model, max_bytes=20000, quantize="auto", targets=["2"])

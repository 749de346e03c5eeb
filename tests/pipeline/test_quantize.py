"""`quantize` and ``compress(quantize=)``: the whole way from a model to a checkpoint and back."""

import copy
import json

import pytest
import torch
from bert_outputs import IDS, outputs, quantized_modules
from closeness import agreement
from safetensors.torch import load_file
from torch import nn

import lowrank
from lowrank import LowRankError, Plan, compress, quantize, report
from lowrank.errors import (
    PlanError,
    TargetError,
    WeightError,
)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("known", [False, True], ids=["plain", "calibrated"])
def test_checkpoints_give_the_same_bits_and_the_reported_bytes(
    tiny_bert, bert_stats, scheme, known, tmp_path
):
    small = compress(tiny_bert, rank=32, stats=bert_stats if known else None, quantize=scheme)
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
    mine, theirs = quantized_modules(small), quantized_modules(half)
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


def test_a_plan_carries_the_codes_out_again(tiny_bert, bert_stats):
    dense = copy.deepcopy(tiny_bert)
    small = compress(tiny_bert, rank=32, stats=bert_stats, quantize="int8")
    done = Plan.from_json(Plan.from_dict(small.config.quantization_config.plan).to_json())
    assert "weights as int8" in str(done)
    with pytest.raises(PlanError, match="pass stats=calibrate"):
        lowrank.apply(copy.deepcopy(dense), done)
    assert torch.equal(outputs(lowrank.apply(dense, done, bert_stats)), outputs(small))


def test_decompress_gives_dense_layers_with_the_same_outputs(tiny_bert, bert_stats):
    small = compress(tiny_bert, rank=32, stats=bert_stats, quantize="int8")
    expected = outputs(small)
    lowrank.decompress(small)
    assert quantized_modules(small) == {}
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
    codes = {name: module.state_dict()["codes"].clone() for name, module in quantized_modules(small).items()}
    before = agreement(outputs(small), outputs(dense))
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(12)]
    lowrank.recover(small, dense, data, steps=20, qat=False)
    assert agreement(outputs(small), outputs(dense)) > before
    assert all(
        torch.equal(quantized_modules(small)[name].state_dict()["codes"], kept)
        for name, kept in codes.items()
    )


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
    assert quantized_modules(tiny_bert) == {}


def test_statistics_of_another_model_are_refused(tiny_bert, bert_stats):
    with torch.no_grad():
        tiny_bert.encoder.layer[1].output.dense.weight.mul_(2)
    with pytest.raises(lowrank.StatsError, match=r"encoder\.layer\.1\.output\.dense"):
        quantize(tiny_bert, stats=bert_stats)
    assert quantized_modules(tiny_bert) == {}


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
    schemes = {module.scheme.name for module in quantized_modules(tiny_bert).values()}
    assert schemes == {"int4", "int8"}
    with pytest.raises(LowRankError, match="quantized already"):
        quantize(tiny_bert, "int8")
    with pytest.raises(TargetError, match=r"it is quantized already \(int8\)"):
        quantize(tiny_bert, targets=["encoder.layer.0.attention.self.query"])
    with pytest.raises(LowRankError, match="quantized already"):
        compress(tiny_bert, keep=0.5)


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


def test_an_interrupt_leaves_a_model_that_can_be_saved(tiny_bert, bert_stats, tmp_path, monkeypatch):
    from lowrank.surgery import replacement

    dense, calls, real = copy.deepcopy(tiny_bert), [], replacement.quantized_module

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(replacement, "quantized_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_bert, stats=bert_stats)
    assert len(quantized_modules(tiny_bert)) == 4
    assert agreement(outputs(tiny_bert), outputs(dense)) > 0.999
    tiny_bert.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(tiny_bert).from_pretrained(tmp_path).eval()), outputs(tiny_bert))


def test_there_is_nothing_to_calibrate_in_a_coded_model():
    model = quantize(nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(lowrank.errors.TargetError, match=r"0: is quantized already \(int8\); decompress"):
        lowrank.calibrate(model, [torch.randn(4, 32)])

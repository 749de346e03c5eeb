"""Checks of what a plan quantizes, before anything changes."""

import copy
import json

import pytest
import torch
from bert_outputs import QUERY, quantized_modules
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import Plan, compress, quantize
from lowrank.errors import (
    CheckpointError,
    PlanError,
    WeightError,
)


def test_nan_is_named_before_anything_changes(tiny_bert):
    with torch.no_grad():
        tiny_bert.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"encoder\.layer\.1\.output\.dense: .*NaN"):
        quantize(tiny_bert)
    assert quantized_modules(tiny_bert) == {}


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


def test_a_plan_without_its_statistics_is_refused_before_anything_changes(tiny_bert, bert_stats):
    small = compress(copy.deepcopy(tiny_bert), rank=16)
    done = Plan.from_dict(quantize(small, stats=bert_stats).config.quantization_config.plan)
    assert done.metric == "weight"
    with pytest.raises(PlanError, match="pass stats=calibrate"):
        lowrank.apply(tiny_bert, done)
    assert lowrank.plan(tiny_bert, rank=8).factorized  # dense still
    with pytest.raises(PlanError, match="quantizes this weight twice"):
        Plan.from_dict(
            done.to_dict() | {"quantized": [*done.to_dict()["quantized"], done.to_dict()["quantized"][0]]}
        )


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
    with pytest.raises(CheckpointError, match=rf"0\.{part} is stored as .*must be"):
        lowrank.load(tmp_path / "small", model=skeleton)
    assert type(skeleton[0]) is nn.Linear


@pytest.mark.parametrize("size", [1e12, 1e-12])
def test_int4_beyond_the_range_of_its_scales_is_refused_by_the_plan(size):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight.data *= size
    with pytest.raises(WeightError, match=r"^2(\.down)?: its largest element is .* Use int8, or ignore"):
        lowrank.plan(model, keep=0.9, quantize="int4", group_size=16)
    decided = lowrank.plan(model, max_bytes=8000, quantize="auto")
    assert {code.scheme for code in decided.quantized if code.name.startswith("2")} <= {"int8"}
    lowrank.apply(model, decided, on_missing_kernel="allow")


def test_a_plan_is_refused_where_a_weight_to_be_quantized_is_not_finite():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(WeightError, match=r"^0: The weight has 4,096 of 4,096 values that are NaN"):
        lowrank.plan(model, max_bytes=20000, quantize="auto", targets=["2"])


def test_a_plan_whose_residual_has_no_codes_is_refused(tiny_bert):
    planned = lowrank.plan(tiny_bert, rank=8, correction=True, quantize="int4")
    damaged = Plan.from_dict({**planned.to_dict(), "quantized": []})
    with pytest.raises(PlanError, match=r"query: its factors are to correct.*no .*query\.base"):
        lowrank.apply(tiny_bert, damaged)
    assert type(tiny_bert.get_submodule(QUERY)) is torch.nn.Linear


@pytest.mark.parametrize("factor", [1e-6, 1e9])
def test_int4_is_refused_where_its_scales_would_be_lost(tiny_bert, factor):
    weight = tiny_bert.get_submodule(QUERY).weight
    with torch.no_grad():
        weight[5] *= factor if factor > 1 else 1
        weight *= factor if factor < 1 else 1
    for call in (
        lambda: quantize(tiny_bert, "int4"),
        lambda: compress(tiny_bert, rank=8, correction=True, quantize="int4"),
    ):
        with pytest.raises(lowrank.WeightError, match=r"query.*largest element is .* Use int8"):
            call()
    assert type(tiny_bert.get_submodule(QUERY)) is torch.nn.Linear
    quantize(tiny_bert, "int8")


@pytest.mark.parametrize("part", ["scale", "codes", "smooth_scale"])
def test_values_that_no_coded_weight_has_are_refused(tiny_bert, bert_stats, tmp_path, part):
    from safetensors.torch import load_file, save_file

    small = quantize(tiny_bert, "int8", stats=bert_stats)
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{QUERY}.{part}"].view(-1)[3] = -128 if part == "codes" else 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(lowrank.errors.CheckpointError, match=rf"query\.{part} has values that no quantized"):
        type(small).from_pretrained(tmp_path)

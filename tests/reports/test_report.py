"""`report` counts what can be counted by hand."""

import json

import pytest
import torch
from closeness import SUMS32
from torch import nn

import lowrank
from lowrank import CheckpointError, LowRankError


def small(mlp: nn.Module) -> nn.Module:
    return lowrank.compress(mlp, rank={"0": 8, "2": 16})


def test_each_layer_is_counted_by_hand(mlp):
    dense = [mlp[0].weight.detach().clone(), mlp[2].weight.detach().clone()]
    report = lowrank.report(small(mlp))
    first, second = report.layers
    assert (first.name, first.shape, first.rank) == ("0", (96, 64), 8)
    assert (second.name, second.shape, second.rank) == ("2", (64, 96), 16)
    assert (first.parameters_before, first.parameters) == (64 * 96, 8 * (64 + 96))
    assert (second.parameters_before, second.parameters) == (64 * 96, 16 * (64 + 96))
    assert (first.bytes_before, first.bytes) == (4 * 64 * 96, 4 * 8 * (64 + 96))
    assert (first.macs_before, first.macs) == (64 * 96, 8 * (64 + 96))
    for layer, weight in zip(report.layers, dense, strict=True):
        values = torch.linalg.svdvals(weight.double())
        assert layer.relative_error == pytest.approx(
            float(values[layer.rank :].norm() / values.norm()), rel=SUMS32
        )


def test_the_totals_are_those_of_the_parameters(mlp):
    before = sum(p.numel() for p in mlp.parameters())
    report = lowrank.report(small(mlp))
    assert report.parameters_before == before == 2 * 64 * 96 + 96 + 64
    assert report.parameters == sum(p.numel() for p in mlp.parameters()) == 24 * (64 + 96) + 96 + 64
    assert report.kept_fraction == report.parameters / before
    assert report.factorized == report.layers


def test_the_macs_are_those_that_pytorch_counts(mlp):
    from torch.utils.flop_counter import FlopCounterMode

    def macs(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 64))
        return counter.get_total_flops() // 2

    before = macs(mlp)
    report = lowrank.report(small(mlp))
    assert sum(layer.macs_before for layer in report.layers) == before
    assert sum(layer.macs for layer in report.layers) == macs(mlp)


def test_checkpoint_bytes_before_are_those_of_the_dense_file_up_to_the_header(mlp, tmp_path):
    dense = (lowrank.save(mlp, tmp_path / "dense") / "model.safetensors").stat().st_size
    report = lowrank.report(small(mlp))
    # each factorized layer has two names more in the header, of at most 100 bytes each
    assert dense <= report.checkpoint_bytes_before <= dense + 2 * 2 * 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bytes_follow_the_dtype(mlp, dtype):
    width = torch.empty(0, dtype=dtype).element_size()
    report = lowrank.report(small(mlp.to(dtype)))
    assert report.layers[0].bytes == width * report.layers[0].parameters
    assert report.layers[0].bytes_before == width * 64 * 96


def test_a_dense_model_has_a_report_without_ranks(mlp):
    report = lowrank.report(mlp)
    assert report.factorized == ()
    assert report.parameters == report.parameters_before
    assert report.checkpoint_bytes == report.checkpoint_bytes_before
    assert report.kept_fraction == 1.0
    assert {layer.rank for layer in report.layers} == {None}


def test_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Embedding(99, 64), nn.Linear(64, 64), nn.Linear(64, 99, bias=False))
    model[2].weight = model[0].weight
    report = lowrank.report(lowrank.compress(model, rank=8))
    assert report.parameters_before == 99 * 64 + 64 * 64 + 64
    assert report.parameters == 99 * 64 + 8 * 128 + 64
    assert report.checkpoint_bytes < 4 * report.parameters + 1000


def test_a_layer_used_twice_counts_once():
    shared = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(shared, nn.Linear(64, 64, bias=False), shared)
    report = lowrank.report(lowrank.compress(model, rank=8))
    assert report.parameters_before == 2 * 64 * 64
    assert report.parameters == 64 * 64 + 8 * 128


def test_a_model_without_linear_layers_has_an_empty_report():
    report = lowrank.report(nn.Sequential(nn.ReLU()))
    assert report.layers == () and report.parameters == 0 and report.kept_fraction == 1.0
    assert "0 of 0 linear layers" in str(report)


def test_json_has_every_field(mlp):
    report = lowrank.report(small(mlp))
    data = json.loads(report.to_json())
    totals = (
        "parameters_before",
        "parameters",
        "checkpoint_bytes_before",
        "checkpoint_bytes",
        "kept_fraction",
    )
    assert {name: data[name] for name in totals} == {name: getattr(report, name) for name in totals}
    assert data["model"] == "Sequential"
    fields = ("name", "rank", "relative_error", "parameters_before", "parameters", "bytes_before", "bytes")
    for row, layer in zip(data["layers"], report.layers, strict=True):
        for name in (*fields, "macs_before", "macs"):
            assert row[name] == getattr(layer, name)
        assert row["shape"] == list(layer.shape)


def test_the_table_shows_layers_and_totals(mlp):
    text = str(lowrank.report(small(mlp)))
    assert "96×64" in text and "64×96" in text
    assert "3,840 of 12,288 parameters remain (31.2%)" in text
    assert "4,000 of 12,448 parameters remain (32.1%)" in text
    assert "2 of 2 linear layers factorized" in text


def test_reporting_does_not_change_the_model(mlp):
    model = small(mlp)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    lowrank.report(model)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_what_is_no_module_is_refused():
    with pytest.raises(LowRankError, match="not str"):
        lowrank.report("bert")  # type: ignore[arg-type]


def test_a_model_without_data_is_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match=r"0\.weight.*meta"):
        lowrank.report(model)

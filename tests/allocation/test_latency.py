"""Latency as a budget. Times are injected where a figure is claimed: no test depends on the machine."""

import itertools
import json

import pytest
import torch
from torch import nn

from lowrank import BudgetError, LatencyTable, LowRankError, LowRankLinear, apply, plan
from lowrank.allocation import latency as latency_module
from lowrank.allocation import planner
from lowrank.inspection import timing


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()


@pytest.fixture
def clock(monkeypatch):
    """A machine whose time is the number of multiplications in linear layers, and nothing else."""
    spent = [0.0]
    linear = nn.functional.linear

    def counted(input, weight, bias=None):
        spent[0] += input.numel() // input.shape[-1] * weight.numel() * 1e-9
        return linear(input, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: spent[0])
    return spent


@pytest.mark.parametrize("speedup", [1.3, 2.0, 3.0])
def test_the_whole_model_is_as_fast_as_asked_and_hardly_faster(wide, clock, speedup):
    inputs = torch.zeros(8, 256)
    decided = plan(wide, speedup=speedup, inputs=inputs)
    before = clock[0]
    wide(inputs)
    dense = clock[0] - before
    apply(wide, decided)
    before = clock[0]
    wide(inputs)
    assert speedup <= dense / (clock[0] - before) < 1.1 * speedup
    assert f"speedup={speedup}" in decided.budget


def test_layers_that_are_faster_than_their_timings_keep_what_they_can(wide, clock):
    """A table that says twice the time of all factors would make the model needlessly small."""
    inputs = torch.zeros(8, 256)
    table = LatencyTable.here(wide)
    plan(wide, speedup=1.5, inputs=inputs, latencies=table)
    table.seconds = {
        shape: [(rank, seconds * (2 if rank else 1)) for rank, seconds in points]
        for shape, points in table.seconds.items()
    }
    wary = plan(wide, speedup=1.5, inputs=inputs, latencies=table)
    faster = 2 * 256 * 512 / sum(layer.parameters for layer in wary)
    assert 1.5 <= faster < 1.5 * 1.05  # it was 1.75; the clock counts products


def test_planning_leaves_the_model_as_it_was(wide, clock):
    wide.train()
    layers = list(wide)
    plan(wide, speedup=1.5, inputs=torch.zeros(8, 256))
    assert list(wide) == layers
    assert wide.training
    assert not any(isinstance(module, LowRankLinear) for module in wide.modules())
    assert not any(module._forward_pre_hooks for module in wide.modules())


def test_a_speedup_out_of_reach_names_the_best(wide, clock):
    with pytest.raises(BudgetError, match=r"a speed-up of \d+\.\d+×"):
        plan(wide, speedup=500.0, inputs=torch.zeros(8, 256))


def test_a_goal_missed_by_the_whole_model_is_refused_with_what_was_measured(wide, clock, monkeypatch):
    seconds = itertools.cycle([1.0, 0.9])  # dense and small in turn
    monkeypatch.setattr(planner, "seconds_of", lambda *_: next(seconds))
    with pytest.raises(BudgetError, match=r"the best measured is 1\.11"):
        plan(wide, speedup=1.5, inputs=torch.zeros(8, 256))


def test_inputs_are_needed(wide):
    with pytest.raises(BudgetError, match="pass inputs="):
        plan(wide, speedup=1.5)


@pytest.mark.parametrize("value", [1.0, 0.5, float("nan"), True, "2"], ids=str)
def test_a_speedup_is_a_number_above_one(wide, value):
    with pytest.raises(BudgetError, match="above 1"):
        plan(wide, speedup=value, inputs=torch.zeros(8, 256))


def test_a_table_is_filled_once_and_survives_saving(wide, clock, tmp_path, monkeypatch):
    table = LatencyTable.here(wide)
    first = plan(wide, speedup=1.5, inputs=torch.zeros(8, 256), latencies=table)
    assert table.seconds.keys() == {"512×256@8", "256×512@8"}
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again == table
    monkeypatch.setattr(latency_module, "timed", lambda *_: pytest.fail("measured again"))
    second = plan(wide, speedup=1.5, inputs=torch.zeros(8, 256), latencies=again)
    assert [layer.rank for layer in second] == [layer.rank for layer in first]


def test_a_table_of_another_machine_is_refused(wide, clock):
    table = LatencyTable({**LatencyTable.here(wide).environment, "threads": "99"})
    with pytest.raises(BudgetError, match="'99'"):
        plan(wide, speedup=1.5, inputs=torch.zeros(8, 256), latencies=table)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"environment": {}, "seconds": {"a": [1]}}'])
def test_a_damaged_table_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(LowRankError, match="not a table of latencies"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize(
    "points",
    [
        [[0, 10**400], [2, 0.1]],
        [[0, -1.0], [2, 0.1]],
        [[0, float("nan")], [2, 0.1]],
        [[1, 0.2], [2, 0.1]],
        [[0, 0.2], [4, 0.1], [2, 0.1]],
        [[0, 0.2]],
        [[0, "0.2"], [2, 0.1]],
    ],
    ids=["huge", "negative", "nan", "no-dense", "not-rising", "one", "text"],
)
def test_impossible_latencies_are_refused(points, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"environment": {"device": "cpu"}, "seconds": {"8×8@2": points}}))
    with pytest.raises(LowRankError, match=r"table\.json: not a table of latencies: 8×8@2"):
        LatencyTable.load(file)

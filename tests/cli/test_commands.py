"""The command line: what it prints, writes and returns; failures are one line and an exit code."""

import json

import pytest
import torch
import transformers
from command_line import one_line

import lowrank
from lowrank import Plan
from lowrank.cli import commands


def test_plan_prints_the_table_of_the_library(run, dense, tiny_bert):
    result = run("plan", dense, "--keep", 0.5)
    assert result.code == 0
    assert result.out == str(lowrank.plan(tiny_bert, keep=0.5)) + "\n"


def test_plan_as_json_is_the_plan(run, dense, tiny_bert):
    result = run("plan", dense, "--rank", 8, "--json")
    assert result.code == 0
    assert Plan.from_json(result.out) == lowrank.plan(tiny_bert, rank=8)


def test_plan_and_inspect_begin_with_the_share_that_can_change(run, dense):
    for arguments in (("plan", dense, "--rank", 8), ("inspect", dense)):
        assert run(*arguments).out.splitlines()[0].endswith(" parameters are in layers that can change.")


def test_plan_draws_a_picture(run, dense, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert run("plan", dense, "--rank", 8, "-q", "--plot", tmp_path / "ranks.png").code == 0
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_compress_writes_a_folder_for_from_pretrained(run, dense, tiny_bert, tmp_path):
    result = run("compress", dense, tmp_path / "out", "--keep", 0.5)
    assert result.code == 0
    expected = lowrank.compress(tiny_bert, keep=0.5)
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 14)[None]
    assert torch.equal(again(ids).last_hidden_state, expected(ids).last_hidden_state)
    assert result.out == str(lowrank.report(expected)) + "\n"


def test_compress_as_json_is_the_report(run, dense, tmp_path):
    result = run("compress", dense, tmp_path / "out", "--rank", 8, "--json")
    assert result.code == 0
    data = json.loads(result.out)
    assert data["checkpoint_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_quiet_prints_nothing(run, dense, tmp_path):
    for arguments in (("compress", dense, tmp_path / "out"), ("plan", dense)):
        result = run(*arguments, "--rank", 8, "-q")
        assert (result.code, result.out, result.err) == (0, "", "")


def test_quiet_json_is_still_written(run, dense):
    assert json.loads(run("plan", dense, "--rank", 8, "-q", "--json").out)["format"] == 2


def test_a_plan_file_makes_the_round_trip(run, dense, tmp_path):
    assert run("plan", dense, "--keep", 0.5, "-q", "--out", tmp_path / "plan.json").code == 0
    plan = Plan.load(tmp_path / "plan.json").with_rank("*.query", 4)
    plan.save(tmp_path / "plan.json")
    result = run("compress", dense, tmp_path / "out", "--plan", tmp_path / "plan.json", "--json")
    assert result.code == 0
    ranks = {layer["name"]: layer["rank"] for layer in json.loads(result.out)["layers"]}
    assert ranks == {layer.name: layer.rank for layer in plan}


def test_overwrite_replaces_a_folder(run, dense, tmp_path):
    assert run("compress", dense, tmp_path / "out", "--rank", 8, "-q").code == 0
    assert run("compress", dense, tmp_path / "out", "--rank", 4, "-q", "--overwrite").code == 0
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").encoder.layer[0].output.dense.rank == 4


def test_inspect_prints_the_report(run, small):
    result = run("inspect", small)
    assert result.code == 0
    assert "12 of 13 linear layers factorized" in result.out
    assert json.loads(run("inspect", small, "--json").out)["layers"][0]["rank"] == 8


def test_inspect_takes_a_dense_folder(run, dense):
    assert "0 of 13 linear layers factorized" in run("inspect", dense).out


def test_bench_measures_every_factorized_layer(run, dense, small):
    result = run("bench", dense, small, "--batch", 2, "--tokens", 8, "--repeats", 2, "--json")
    assert result.code == 0
    data = json.loads(result.out)
    assert len(data["layers"]) == 12
    assert data["environment"]["repeats"] == 2


def test_bench_prints_a_table(run, dense, small):
    result = run("bench", dense, small, "--batch", 2, "--tokens", 8, "--repeats", 2)
    assert result.code == 0 and "whole model" in result.out


def test_bench_of_two_dense_folders_fails_clearly(run, dense):
    result = run("bench", dense, dense, "--batch", 2, "--tokens", 8)
    assert result.code == 1
    assert "no factorized layer" in one_line(result)


def test_an_output_folder_with_files_is_refused_before_any_work(run, dense, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    monkeypatch.setattr(commands, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    result = run("compress", dense, tmp_path / "out", "--rank", 8)
    assert result.code == 1
    assert "not empty" in one_line(result) and "--overwrite" in result.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 99, "model": "x", "layers": []}', "9" * 5000],
    ids=["empty", "list", "newer", "digits"],
)
def test_a_plan_that_is_none_is_one_line(run, dense, tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    result = run("compress", dense, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert result.code == 1
    assert "plan" in one_line(result)
    assert "ValueError" not in result.err


def test_a_missing_plan_is_one_line(run, dense, tmp_path):
    result = run("compress", dense, tmp_path / "out", "--plan", tmp_path / "none.json")
    assert result.code == 1
    assert "none.json: the plan cannot be read" in one_line(result)


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_plan_that_cannot_be_written_is_one_line_before_any_work(run, dense, tmp_path, monkeypatch, option):
    monkeypatch.setattr(commands, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    result = run("plan", dense, "--rank", 8, option, tmp_path / "missing" / "plan.png")
    assert result.code == 1
    assert "plan.png: cannot be written" in one_line(result)


@pytest.mark.parametrize("command", ["compress", "calibrate"])
def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(
    run, dense, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(commands, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    result = run(command, dense, tmp_path / "file" / "out", "--data", tmp_path / "file")
    assert result.code == 1
    assert "out: cannot be written" in one_line(result)


def test_compressing_a_compressed_folder_at_a_budget_is_refused_clearly(run, small, tmp_path):
    result = run("compress", small, tmp_path / "out", "--rank", 4)
    assert result.code in (1, 2)
    assert "factorized already" in one_line(result)


def test_compress_codes_the_weights(run, dense, tmp_path):
    done = run("compress", dense, tmp_path / "out", "--rank", 16, "--quantize", "int8", "-q")
    assert done.code == 0, done.err
    report = json.loads(run("inspect", tmp_path / "out", "--json").out)
    assert {code["scheme"] for code in report["quantized"]} == {"int8"}
    refused = run("compress", dense, tmp_path / "other", "--rank", 16, "--quantize", "int3")
    assert (refused.code, refused.out) == (2, "")
    assert "known schemes are" in refused.err

"""Exit codes, and failures as one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import one_line, program
from typer.testing import CliRunner

import lowrank
from lowrank.cli import commands


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["plan"],
        ["plan", "x", "--rank", "eight"],
        ["compress", "only-a-source"],
        ["shrink", "x"],
    ],
    ids=["option", "no-source", "no-number", "no-output", "command"],
)
def test_what_typer_refuses_is_exit_code_2(run, arguments):
    result = run(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "a/b/c"])
@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_a_missing_folder_is_one_line_and_exit_code_1(run, command, source):
    result = run(command, source, *(["--rank", 8] if command == "plan" else []))
    assert result.code == 1
    assert f"{source}: there is no such folder" in one_line(result)


def test_a_damaged_file_is_one_line(run, small):
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    result = run("inspect", small)
    assert result.code == 1
    assert str(file) in one_line(result)


def test_debug_shows_the_traceback(run, dense):
    with pytest.raises(lowrank.BudgetError, match="exactly one budget"):
        run("plan", dense, "--debug")


def test_an_interrupt_is_one_line(run, dense, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load_model", interrupted)
    result = run("inspect", dense)
    assert result.code in (1, 130)
    assert one_line(result) == "lowrank: interrupted"


def test_help_lists_the_commands():
    result = CliRunner().invoke(commands.app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("plan", "compress", "inspect", "bench", "demo"))


def test_the_module_runs_as_a_program_with_clean_streams(dense):
    done = program("plan", dense, "--rank", 8, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "BertModel"
    assert done.stderr == ""


def test_a_failing_program_returns_its_code_without_a_traceback(dense):
    done = program("plan", dense)
    assert done.returncode == 2
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)


def test_debug_prints_a_traceback_on_stderr(dense):
    done = program("plan", dense, "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "BudgetError" in done.stderr


def test_the_script_is_installed():
    script = Path(sys.executable).with_name("lowrank")
    if not script.exists():
        pytest.skip("lowrank is not installed in this environment")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "compress" in done.stdout

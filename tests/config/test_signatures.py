"""A type checker and an editor see the options of `compress`, `plan` and `recover` as keywords."""

import subprocess
import sys

import pytest

CALLS = """
from torch import nn

import lowrank
from lowrank import CompressionConfig

model = nn.Sequential(nn.Linear(8, 8))
lowrank.compress(model, keep=0.5)
lowrank.compress(model, rank={"*": 4}, targets=["*"], seed=1, progress=True)
lowrank.compress(model, CompressionConfig(keep=0.5))
lowrank.plan(model, max_bytes=10, quantize="auto")
lowrank.recover(model, model, [], minutes=1.0, blockwise=True)
lowrank.compress(model, keep="half")  # wrong
lowrank.compress(model, kep=0.5)  # wrong
lowrank.plan(model, keep=0.5, seed=1)  # wrong
lowrank.plan(model, round_to=1.5)  # wrong
lowrank.recover(model, model, [], steps="many")  # wrong
CompressionConfig(keep="half")  # wrong
"""


def test_strict_type_checking_accepts_the_right_calls_and_refuses_the_wrong_ones(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-incremental", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused = {
        int(line.split(":")[1])
        for line in done.stdout.splitlines()
        if str(file.name) in line and ": error:" in line
    }
    wrong = {number for number, line in enumerate(CALLS.split("\n"), 1) if line.endswith("# wrong")}
    assert refused == wrong, done.stdout + done.stderr

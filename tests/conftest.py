"""Small models with fixed weights and matrices with a known spectrum, shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from checkpoint_folders import build_mlp, compressed
from command_line import Result
from hypothesis import settings
from random_tensors import gaussian
from torch import Tensor, nn

import lowrank
from lowrank import calibrate, cli

# The same examples in every run: a red test is a change of the code, never of the dice.
settings.register_profile("lowrank", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lowrank")


@pytest.fixture
def mlp() -> nn.Sequential:
    """Two linear layers of 64×96, on a private seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()


@pytest.fixture
def tiny_bert() -> nn.Module:
    """A BERT with twelve linear layers in its encoder, and the pooler; hidden size 64."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(config).eval()


@pytest.fixture(scope="session")
def matrix_with() -> Callable[..., Tensor]:
    """A function that makes a float64 matrix with given singular values and random singular vectors."""

    def make(values: Sequence[float] | Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.as_tensor(values, dtype=torch.float64)

        def orthonormal(size: int) -> Tensor:  # (size, len(values))
            gaussian = torch.randn(size, len(values), generator=generator, dtype=torch.float64)
            return torch.linalg.qr(gaussian).Q

        return orthonormal(rows) * values @ orthonormal(columns).T

    return make


@pytest.fixture
def mlp_folder(tmp_path: Path) -> Path:
    """A folder with a compressed MLP."""
    return lowrank.save(compressed(build_mlp), tmp_path / "small")


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program in this process, as the `lowrank` script does."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["lowrank", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def bert_stats(tiny_bert):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(8)]
    return lowrank.calibrate(tiny_bert, data)


@pytest.fixture
def mlp_stats(mlp):
    return calibrate(mlp, [gaussian(60, 64, seed=i) * torch.logspace(0, -2, 64) for i in range(8)])


@pytest.fixture
def data():
    return [gaussian(50, 64, seed=i) + 0.3 for i in range(4)]

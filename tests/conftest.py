"""Small models with fixed weights and matrices with a known spectrum, shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

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

"""pytest-benchmark: a dense layer and its factors at half the parameters, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank import LowRankLinear

SHAPES = [(768, 768), (768, 3072), (3072, 768)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}to{shape[1]}")
def dense(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*request.param)


@pytest.fixture(params=["dense", "half"])
def layer(request: pytest.FixtureRequest, dense: nn.Linear) -> nn.Module:
    if request.param == "dense":
        return dense
    rank = dense.weight.numel() // (2 * (dense.in_features + dense.out_features)) // 16 * 16
    return LowRankLinear.from_linear(dense, rank)


def test_forward_of_1024_tokens(benchmark: Callable[..., Any], layer: nn.Module) -> None:
    tokens = torch.randn(8, 128, layer.in_features)
    with torch.no_grad():
        assert benchmark(layer, tokens).shape[-1] == layer.out_features


def test_forward_and_backward_of_1024_tokens(benchmark: Callable[..., Any], layer: nn.Module) -> None:
    tokens = torch.randn(8, 128, layer.in_features)

    def step() -> None:
        layer.zero_grad()
        layer(tokens).sum().backward()

    benchmark(step)
    assert all(parameter.grad is not None for parameter in layer.parameters())

"""pytest-benchmark: factoring one weight, by the solvers here and by ``torch.linalg.svd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank.linalg import error_curve, truncated_svd

SHAPES = [(768, 768), (3072, 768), (768, 3072), (1000, 1000)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(request.param, generator=generator)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_truncated_svd_at_rank_100(benchmark: Callable[..., Any], weight: torch.Tensor, solver: str) -> None:
    factors = benchmark(truncated_svd, weight, 100, solver=solver)
    assert factors.left.shape[1] == 100


def test_torch_linalg_svd(benchmark: Callable[..., Any], weight: torch.Tensor) -> None:
    left, _, _ = benchmark(torch.linalg.svd, weight, full_matrices=False)
    assert left.shape[0] == weight.shape[0]


def test_spectrum_at_every_rank(benchmark: Callable[..., Any], weight: torch.Tensor) -> None:
    assert len(benchmark(error_curve, weight).tail) == min(weight.shape) + 1

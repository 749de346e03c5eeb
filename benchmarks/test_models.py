"""pytest-benchmark: planning, compressing, running, saving and loading BERT-base shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from lowrank import compress, plan


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig()).eval()


@pytest.fixture(scope="module")
def small(bert: BertModel) -> BertModel:
    return compress(copy.deepcopy(bert), keep=0.5)


@pytest.mark.parametrize("budget", [{"rank": 100}, {"keep": 0.5}], ids=["rank-100", "keep-half"])
def test_compress(benchmark: Any, bert: BertModel, budget: dict[str, float]) -> None:
    result = benchmark.pedantic(
        compress, setup=lambda: ((copy.deepcopy(bert),), budget), rounds=3, warmup_rounds=1
    )
    assert result.num_parameters() < bert.num_parameters()


def test_plan_keep_half(benchmark: Any, bert: BertModel) -> None:
    assert benchmark.pedantic(plan, (bert,), {"keep": 0.5}, rounds=3).kept_fraction <= 0.5


@pytest.mark.parametrize("which", ["dense", "half"])
def test_forward_of_8_by_128_tokens(
    benchmark: Callable[..., Any], bert: BertModel, small: BertModel, which: str
) -> None:
    model = bert if which == "dense" else small
    ids = torch.randint(30522, (8, 128))
    with torch.no_grad():
        assert benchmark(model, ids).last_hidden_state.shape == (8, 128, 768)


@pytest.mark.parametrize("which", ["dense", "half"])
def test_from_pretrained(
    benchmark: Callable[..., Any], bert: BertModel, small: BertModel, which: str, tmp_path: Path
) -> None:
    model = bert if which == "dense" else small
    model.save_pretrained(tmp_path)
    assert benchmark(AutoModel.from_pretrained, tmp_path).num_parameters() == model.num_parameters()

"""`compress` in one call, and in several."""

import pytest
import torch
from front_doors import mlp

import lowrank
from lowrank import LowRankLinear, compress
from lowrank.config import CompressionConfig
from lowrank.errors import LowRankError


def test_the_layers_that_remain_can_be_compressed_in_a_second_call(tiny_bert):
    compress(tiny_bert, rank=8, targets=["*.query"])
    done = {name: m for name, m in tiny_bert.named_modules() if isinstance(m, LowRankLinear)}
    compress(tiny_bert, rank=4, targets=["*.key"])
    ranks = {n: m.rank for n, m in tiny_bert.named_modules() if isinstance(m, LowRankLinear)}
    assert sorted(ranks.values()) == [4, 4, 8, 8]
    assert all(tiny_bert.get_submodule(name) is module for name, module in done.items())


def test_an_object_and_its_options_as_keywords_ask_for_the_same():
    config = CompressionConfig(keep=0.5, round_to=4)
    assert lowrank.plan(mlp(), config) == lowrank.plan(mlp(), keep=0.5, round_to=4)
    by_object, by_options = lowrank.compress(mlp(), config), lowrank.compress(mlp(), keep=0.5, round_to=4)
    x = torch.randn(3, 64)
    assert torch.equal(by_object(x), by_options(x))


def test_a_config_and_an_option_beside_it_are_refused():
    with pytest.raises(LowRankError, match=r"either a CompressionConfig or round_to=, not both"):
        lowrank.plan(mlp(), CompressionConfig(keep=0.5), round_to=4)
    with pytest.raises(LowRankError, match=r"^config=0\.5: give a CompressionConfig"):
        lowrank.plan(mlp(), 0.5)

"""The stack of repeated blocks is found whatever its names."""

import torch
from torch import nn

from lowrank.inspection.blocks import find_blocks, outputs_of


def test_the_layers_of_bert_are_its_blocks(tiny_bert):
    assert list(find_blocks(tiny_bert)) == ["encoder.layer.0", "encoder.layer.1"]


def test_the_larger_of_two_stacks_is_taken():
    small = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
    large = nn.Sequential(*[nn.Linear(40, 40) for _ in range(2)])
    assert list(find_blocks(nn.ModuleDict({"a": small, "b": large}))) == ["b.0", "b.1"]


def test_unlike_modules_are_no_stack():
    assert find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == {}


def test_hidden_states_are_those_of_the_blocks_and_hooks_go(tiny_bert):
    ids = torch.arange(6)[None]
    with outputs_of(find_blocks(tiny_bert).values()) as found:
        outputs = tiny_bert(ids)
        assert torch.equal(found[1], outputs.last_hidden_state)
    assert not any(module._forward_hooks for module in tiny_bert.modules())

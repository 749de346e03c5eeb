"""What is added to a layer's output is seen while a block runs."""

import pytest
import torch
from random_tensors import gaussian
from torch import nn

from lowrank.surgery.residual_adds import ResidualAddRecorder


class Block(nn.Module):
    """Adds in one of several ways, after a dropout that does nothing, and goes on."""

    def __init__(self, add) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout()
        self.add = add
        self.reached_the_end = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.add(x, self.drop(self.second(self.first(x).relu())))
        self.reached_the_end = True
        return y


WAYS = {
    "plus": lambda x, y: x + y,
    "plus-the-other-way": lambda x, y: y + x,
    "torch.add": torch.add,
    "in-place": lambda x, y: y.__iadd__(x),
    "method": lambda x, y: y.add_(x),
    "reshaped": lambda x, y: x.flatten(0, 1) + y.flatten(0, 1),
}


@pytest.fixture
def x() -> torch.Tensor:
    return gaussian(2, 3, 8)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_the_addend_is_seen_however_it_is_added(way, x):
    block = Block(WAYS[way]).eval()
    recorder = ResidualAddRecorder(block, ["first", "second"], ["second"], to_the_end=True)
    recorder.run(lambda: block(x))
    assert torch.equal(recorder.addends["second"], x)
    assert recorder.addends.keys() == {"second"}  # nothing is added to what the first layer returns
    assert torch.equal(recorder.inputs["first"], x)
    assert recorder.adds and not recorder.repeated


@torch.no_grad()
def test_the_block_runs_as_far_as_it_must(x):
    block = Block(WAYS["plus"]).eval()
    ResidualAddRecorder(block, ["second"], ["second"]).run(lambda: block(x))
    assert not block.reached_the_end
    ResidualAddRecorder(block, ["second"], ["second"], to_the_end=True).run(lambda: block(x))
    assert block.reached_the_end


@torch.no_grad()
def test_an_addend_is_kept_as_it_was_when_it_is_changed_in_place_later(x):
    block = Block(lambda x, y: (x + y, x.zero_())[0]).eval()
    recorder = ResidualAddRecorder(block, ["second"], ["second"], to_the_end=True)
    before = x.clone()
    recorder.run(lambda: block(x))
    assert torch.equal(recorder.addends["second"], before)


@torch.no_grad()
def test_sums_of_other_shapes_and_products_are_none(x):
    block = Block(lambda x, y: y * x + x.sum()).eval()
    recorder = ResidualAddRecorder(block, ["second"], to_the_end=True)
    recorder.run(lambda: block(x))
    assert not recorder.adds and not recorder.addends


@torch.no_grad()
def test_a_layer_that_runs_twice_is_told(x):
    block = Block(WAYS["plus"]).eval()
    block.second = block.first
    recorder = ResidualAddRecorder(block, ["first"], to_the_end=True)
    recorder.run(lambda: block(x))
    assert recorder.repeated == {"first"}


def test_hooks_go_after_an_error(x):
    def fail(x, y):
        raise ValueError("no sum today")

    block = Block(fail).eval()
    recorder = ResidualAddRecorder(block, ["second"], ["second"])
    with pytest.raises(ValueError, match="no sum today"):
        recorder.run(lambda: block(x))
    seen = recorder.inputs["second"]
    block.add = torch.add
    block(x + 1)
    assert recorder.inputs["second"] is seen

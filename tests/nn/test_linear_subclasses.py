"""A subclass of a linear layer that computes the same is one, by its code and not by its name."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from closeness import SUMS32
from torch import nn

import lowrank
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft
from lowrank.nn import layer_type_of, linear_subclasses


class Documented(nn.Linear):
    """Overrides nothing."""


class Transposed(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As transformers' ``FalconLinear`` computes."""
        hidden_states = input @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias


class Functional(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class ByName(nn.Linear):
    def forward(self, x):
        y = torch.matmul(x, self.weight.t())
        return y if self.bias is None else self.bias + y


class Super(nn.Linear):
    def extra_repr(self):
        return "super"

    def forward(self, x):
        return super().forward(x)


class Grandchild(Transposed):
    pass


SAME = (Documented, Transposed, Functional, ByName, Super, Grandchild)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class BiasTwice(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias + self.bias


class Forgetful(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class OnlyMatrices(nn.Linear):
    def forward(self, x):
        return (self.weight @ x.T).T + self.bias if self.bias is not None else (self.weight @ x.T).T


class Activated(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))


class WithAnotherMethod(nn.Linear):
    def merge(self):
        return self.weight


class WithItsOwnSizes(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)


class WithAnOption(nn.Linear):
    def forward(self, x, scale=None):
        return super().forward(x)


class WithAKeyword(nn.Linear):
    def forward(self, x, *, scale=None):
        return super().forward(x)


class ByTheInput(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.ndim == 2 else x


def linear(input, weight, bias):
    return torch.nn.functional.dropout(torch.nn.functional.linear(input, weight, bias))


class OfAnotherFunction(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Setting(nn.Linear):
    def __setattr__(self, name, value):
        super().__setattr__(name, value)


class Mixin:
    def merge(self):
        return None


class Mixed(nn.Linear, Mixin):
    pass


OTHER = (
    *(Twice, BiasTwice, Forgetful, OnlyMatrices, Activated, WithAnotherMethod, WithItsOwnSizes, WithAnOption),
    *(WithAKeyword, ByTheInput, OfAnotherFunction, Setting, Mixed),
)


def name_of(cls: type) -> str:
    return cls.__name__


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("cls", SAME, ids=name_of)
def test_a_subclass_that_computes_the_same_is_factorized_and_comes_back_as_what_it_was(cls, bias, tmp_path):
    model = nn.Sequential(cls(64, 48, bias=bias), nn.ReLU(), nn.Linear(48, 64)).eval()
    dense = copy.deepcopy(model)
    x = torch.randn(7, 64)
    lowrank.compress(model, rank=24)
    assert model[0].layer_type == cls.__name__
    small = model(x)
    lowrank.save(model, tmp_path / "folder")
    loaded = lowrank.load(tmp_path / "folder", copy.deepcopy(dense))
    assert torch.equal(loaded(x), small)
    again = lowrank.decompress(loaded)
    assert [type(module) for module in again] == [type(module) for module in dense]
    assert torch.allclose(again(x), small, atol=SUMS32)


@pytest.mark.parametrize("cls", SAME, ids=name_of)
def test_at_full_error_zero_the_factors_compute_what_the_subclass_does(cls, matrix_with):
    layer = cls(64, 48)
    layer.weight.data = matrix_with([3.0, 2.0, 1.0], 48, 64).float()
    model = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(7, 64)
    before = model(x)
    assert torch.allclose(lowrank.compress(model, rank=3)(x), before, atol=SUMS32)


@pytest.mark.parametrize("cls", OTHER, ids=name_of)
def test_a_subclass_that_may_compute_something_else_or_would_lose_something_stays_dense(cls):
    layer = cls(8) if cls is WithItsOwnSizes else cls(8, 8)
    model = nn.Sequential(layer, nn.Linear(8, 8))
    assert (
        draft(Inspection(model))["0"].reason
        == f"is a {cls.__name__}, which may compute something else than nn.Linear"
    )


def test_a_subclass_is_tried_without_touching_random_state_or_default_device():
    before = torch.random.get_rng_state()
    linear_subclasses.computes_the_same.cache_clear()
    with torch.device("meta"):
        assert linear_subclasses.computes_the_same(Transposed)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_subclasses_of_one_name_are_told_apart():
    first = type("Alike", (nn.Linear,), {"__module__": "one"})
    second = type("Alike", (nn.Linear,), {"__module__": "two"})
    model = nn.Sequential(first(32, 32), second(32, 32))
    names = [layer_type_of(layer).name for layer in model]
    assert names == ["Alike", "two.Alike"]
    lowrank.decompress(lowrank.compress(model, rank=4))
    assert [type(layer) for layer in model] == [first, second]


def test_a_subclass_that_is_defined_anew_is_the_last_one():
    old = type("Anew", (nn.Linear,), {"__module__": "here"})
    new = type("Anew", (nn.Linear,), {"__module__": "here"})
    assert layer_type_of(old(2, 2)).name == layer_type_of(new(2, 2)).name == "Anew"
    model = nn.Sequential(new(32, 32))
    assert type(lowrank.decompress(lowrank.compress(model, rank=4))[0]) is new

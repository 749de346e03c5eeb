"""The table of layers that can be factorized: by exact type, and by the word in plans."""

import pytest
import torch
from random_tensors import gaussian
from torch import nn

from lowrank import LowRankError
from lowrank.nn import LayerType, layer_type_named, layer_type_of, register_layer_type
from lowrank.nn import layer_types as module
from lowrank.nn.layer_types import check_padding, find_layer_type


class InputMajor(nn.Module):
    """Stores its weight as ``(in, out)``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features, device="meta")) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


LAYER_TYPE = LayerType(name="input-major", module=InputMajor, transposed=True, build=InputMajor)


@pytest.fixture
def registered():
    register_layer_type(LAYER_TYPE)


def test_an_unknown_name_says_what_to_call():
    with pytest.raises(LowRankError, match=r'"of-another-program" here\. Call .*register_layer_type first'):
        layer_type_named("of-another-program")
    assert find_layer_type("of-another-program") is None


def test_a_registered_type_is_found_by_module_and_by_name(registered):
    assert layer_type_of(InputMajor(4, 6)) is LAYER_TYPE
    assert layer_type_named("input-major") is find_layer_type("input-major") is LAYER_TYPE


def test_subclasses_of_other_layers_are_no_layer_types(registered):
    class Scaled(InputMajor):
        def forward(self, x):
            return 2 * super().forward(x)

    assert layer_type_of(Scaled(4, 6)) is None
    assert layer_type_of(nn.Conv2d(4, 4, 1)) is None


def test_a_subclass_of_linear_that_may_compute_something_else_is_not_certain():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    assert layer_type_of(nn.Linear(4, 6)).certain
    assert not layer_type_of(Doubled(4, 6)).certain


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", ["linear", "input-major"])
def test_a_layer_is_made_around_a_weight_and_computes_with_it(registered, name, with_bias):
    layer_type = layer_type_named(name)
    weight, bias = gaussian(6, 4), nn.Parameter(gaussian(6, seed=1)) if with_bias else None
    layer = layer_type.layer(weight, bias)
    assert type(layer) is layer_type.module
    assert layer.bias is bias
    assert torch.equal(layer_type.weight(layer), weight)
    x = gaussian(5, 4, seed=2)
    # float32 sums of four products in one order or another
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [None, 0, 9, -1, -10])
def test_a_padding_row_counts_from_either_end(index):
    check_padding(index, 10)


@pytest.mark.parametrize("index", [10, -11, 0.5, True], ids=repr)
def test_a_padding_row_that_is_not_there_is_refused(index):
    with pytest.raises(LowRankError, match=f"padding_idx={index}: .*-10.* 9"):
        module.check_padding(index, 10)

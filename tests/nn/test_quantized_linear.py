"""A linear layer with integer weights: outputs, dtypes, gradients, compilers."""

import pytest
import torch
from closeness import CANCELLED32, LAYERS32
from random_layers import integers, smoothed
from random_tensors import gaussian
from torch import nn

from lowrank.linalg import Scheme
from lowrank.nn import QuantizedLinear
from lowrank.nn import integer_matmul as module


def test_outputs_are_those_of_the_weight(layer):
    x = gaussian(5, 7, 64)
    expected = nn.functional.linear(x, gaussian(48, 64), gaussian(48))
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (5, 7, 48)
    assert (y - expected).norm() < (0.015 if layer.scheme.name == "int8" else 0.1) * expected.norm()


def test_scaled_and_shifted_inputs_give_the_same_function():
    made, x, expected = smoothed()
    with torch.no_grad():
        y = made(x)
        plain = nn.functional.linear(x, made.dense_weight(), made.bias - made.shift())
    assert (y - expected).norm() < 0.02 * expected.norm()
    assert (plain - expected).norm() < 0.02 * expected.norm()


@integers
def test_each_row_has_its_own_scale():
    layer = QuantizedLinear.from_weight(gaussian(48, 64), None, Scheme("int8"))
    x = gaussian(4, 64) * torch.tensor([[1e-6], [1.0], [1e6], [0.0]])
    with torch.no_grad():
        together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(together, alone)
    expected = x @ gaussian(48, 64).T
    assert ((together - expected).norm(dim=1) <= 0.015 * expected.norm(dim=1)).all()


@integers
def test_nan_and_infinity_are_not_hidden():
    layer = QuantizedLinear.from_weight(gaussian(48, 64), None, Scheme("int8"))
    x = gaussian(3, 64)
    x[0, 3], x[1, 3] = float("nan"), float("inf")
    with torch.no_grad():
        y = layer(x)
    assert not y[:2].isfinite().any()
    assert y[2].isfinite().all()


@integers
def test_large_outputs_are_computed_part_by_part(monkeypatch):
    layer = QuantizedLinear.from_weight(gaussian(48, 64), nn.Parameter(gaussian(48)), Scheme("int8"))
    with torch.no_grad():
        whole = layer(gaussian(50, 64))
        monkeypatch.setattr(module, "PART", 48 * 7)
        assert torch.equal(layer(gaussian(50, 64)), whole)


def test_a_wrong_number_of_features_is_pytorchs_error(layer):
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        layer(gaussian(20, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_what_the_layer_computes_in(layer, dtype):
    codes, scale = layer.codes.clone(), layer.scale.clone()
    layer.to(dtype)
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.scale, scale)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    x = gaussian(20, 64)
    with torch.no_grad():
        y = layer(x.to(dtype))
    assert y.dtype == dtype
    expected = nn.functional.linear(x, gaussian(48, 64), gaussian(48))
    assert (y.float() - expected).norm() < 0.1 * expected.norm()


def test_gradients_reach_input_and_bias(layer):
    x = gaussian(20, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.dense_weight().sum(0), rtol=LAYERS32, atol=LAYERS32)
    torch.testing.assert_close(layer.bias.grad, torch.full((48,), 20.0))


def test_gradients_through_scaled_inputs():
    made, *_ = smoothed()
    x = gaussian(20, 64).requires_grad_()
    made(x).sum().backward()
    torch.testing.assert_close(x.grad[0], made.dense_weight().sum(0), rtol=CANCELLED32, atol=CANCELLED32)


def test_export_gives_what_the_layer_computes(layer):
    x = gaussian(20, 64)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()(x)
        expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
        assert (layer(x) - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(exported, expected)


def test_compiling_the_whole_layer(layer):
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(gaussian(20, 64))
        decoded = nn.functional.linear(gaussian(20, 64), layer.dense_weight(), layer.bias)
        expected = layer(gaussian(20, 64)) if layer.runs_on() == "int8" else decoded
    torch.testing.assert_close(compiled, expected)


def test_no_rows_give_no_rows(layer):
    with torch.no_grad():
        assert layer(torch.empty(0, 64)).shape == (0, 48)

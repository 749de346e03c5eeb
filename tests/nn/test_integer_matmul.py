"""Integer kernels compute what the dequantized weight does, or are not used."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from closeness import LAYERS32, SUMS32
from random_layers import integers, smoothed
from random_tensors import gaussian
from torch import nn

from lowrank.linalg import Scheme
from lowrank.nn import LowRankLinear, QuantizedEmbedding, QuantizedLinear, TiedLinear
from lowrank.nn import integer_matmul as module

INT4 = module.why_no_int4_kernel(64, 64, 32, torch.device("cpu")) is None
weight_only = pytest.mark.skipif(not INT4, reason="this processor has no int4 kernel")

SIZES = [1, 2, 3, 7, 8, 16, 17, 33]


def exact_int_mm(left, right, *, out=None):
    """The product that `torch._int_mm` is to give, and no product that it gets wrong."""
    assert left.shape[1] > 1, "with one input, torch._int_mm returns garbage"
    product = (left.double() @ right.double()).to(torch.int32)
    return product if out is None else out.copy_(product)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("kernel", ["exact", pytest.param("own", marks=integers)])
def test_integers_multiply_every_shape_as_the_decoded_weight_does(rows, kernel, monkeypatch):
    if kernel == "exact":
        monkeypatch.setattr(module, "INTEGERS", True)
        monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
    for columns in SIZES:
        layer = QuantizedLinear.from_weight(gaussian(rows, columns), None, Scheme("int8"))
        assert layer.runs_on() == ("dequantized" if columns == 1 else "int8")
        for tokens in (0, *SIZES):
            x = gaussian(columns, tokens, seed=1).T  # in no way that kernels like
            codes, step = module.quantized(x.contiguous(), None, None)
            given = codes.double() * step.double() if columns > 1 else x.double()
            exact = given @ layer.codes.double().T * layer.scale.double().T
            with torch.no_grad():
                torch.testing.assert_close(layer(x).double(), exact, rtol=SUMS32, atol=SUMS32)


def test_no_layer_with_one_input_multiplies_integers(monkeypatch):
    monkeypatch.setattr(module, "INTEGERS", True)
    monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
    x, weight = gaussian(20, 1), gaussian(48, 1)
    layer = QuantizedLinear.from_weight(weight, None, Scheme("int8"))
    table = QuantizedEmbedding.from_embedding(nn.Embedding(48, 1, _weight=weight), Scheme("int8"))
    factors = LowRankLinear(64, 48, 1, bias=False)
    factors.up = layer
    expected = layer.dense_weight()
    with torch.no_grad():
        for small in (layer, TiedLinear(layer), TiedLinear(table)):
            for called in (small, torch.compile(small, fullgraph=True, backend="aot_eager")):
                torch.testing.assert_close(called(x), x @ expected.T)
        wide = gaussian(20, 64)
        torch.testing.assert_close(
            factors(wide), wide @ factors.dense_weight().T, rtol=LAYERS32, atol=LAYERS32
        )


def test_the_smallest_inputs_are_not_lost(monkeypatch):
    monkeypatch.setattr(module, "INTEGERS", True)
    monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
    layer = QuantizedLinear.from_weight(gaussian(48, 64), None, Scheme("int8"))
    for size in (1e-30, 1e-36, 3e-37, 1e-37):
        x = gaussian(20, 64) * size
        exact = x.double() @ layer.dense_weight().double().T
        with torch.no_grad():
            for called in (layer, torch.compile(layer, backend="aot_eager")):
                assert (called(x).double() - exact).norm() < 0.05 * exact.norm()


def test_what_runs_is_told(layer):
    if layer.scheme.name == "int8":
        assert layer.runs_on() == ("int8" if module.INTEGERS else "dequantized")
    else:
        assert layer.runs_on() == ("int4 (up to 128 tokens)" if INT4 else "dequantized")
    assert QuantizedLinear(64, 40, False, Scheme("int4")).runs_on() == "dequantized"
    assert QuantizedLinear(64, 48, False, Scheme("int4", 16)).runs_on() == "dequantized"
    assert layer.to("meta").runs_on() == "dequantized"


@integers
def test_the_integers_of_the_input_are_the_nearest(monkeypatch):
    x = gaussian(30, 64) * torch.logspace(-20, 20, 30)[:, None]
    monkeypatch.setattr(module, "PART_OF_INPUT", 64 * 7)
    codes, step = module.quantized(x, None, None)
    assert torch.equal(step, x.abs().amax(1, keepdim=True) / 127)
    assert ((x.double() / step.double() - codes).abs() < 0.5001).all()
    scale, input_shift = gaussian(64, seed=1).abs().half(), gaussian(64, seed=2).half()
    given = x[15:] * scale.float() - input_shift.float()
    codes, step = module.quantized(x[15:], scale, input_shift)
    assert ((given.double() / step.double() - codes).abs() < 0.501).all()


@integers
def test_rows_of_zeros_give_the_bias():
    bias = nn.Parameter(gaussian(48))
    layer = QuantizedLinear.from_weight(gaussian(48, 64), bias, Scheme("int8"))
    with torch.no_grad():
        assert torch.equal(layer(torch.zeros(3, 64)), bias.expand(3, 48))


def coded4(rows=64, columns=128, size=32, seed=0, smooth_scale=None):
    weight, bias = gaussian(rows, columns, seed=seed), nn.Parameter(gaussian(rows))
    return QuantizedLinear.from_weight(weight, bias, Scheme("int4", size), smooth_scale=smooth_scale).eval()


@weight_only
@pytest.mark.parametrize("smooth_scale", [False, True], ids=["plain", "smooth_scale"])
@pytest.mark.parametrize("tokens", [1, 5, 128])
@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(16, 32, 32), (48, 64, 64), (64, 128, 32), (112, 256, 256), (160, 256, 128)]
)
def test_the_int4_kernel_computes_what_the_decoded_weight_does(rows, columns, size, tokens, smooth_scale):
    scale = gaussian(columns, seed=5).abs().add(0.5).half() if smooth_scale else None
    layer, x = coded4(rows, columns, size, smooth_scale=scale), gaussian(tokens, columns, seed=1)
    expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    with torch.no_grad():
        y = layer(x)
    assert layer.codes.ndim == 1  # in the kernel's order
    assert y.dtype == torch.float32
    assert (y - expected).norm() < 0.005 * expected.norm()  # three roundings to bfloat16, each of 2⁻⁹ at most


@weight_only
def test_codes_that_a_kernel_has_used_leave_the_layer_as_they_were_stored():
    layer, x = coded4(112), gaussian(3, 128, seed=1)
    stored, many = {k: v.clone() for k, v in layer.state_dict().items()}, gaussian(200, 128, seed=2)
    with torch.no_grad():
        decoded, size = layer(many), layer.codes.nbytes
        y = layer(x)
        assert layer.codes.ndim == 1
        assert layer.codes.nbytes == size
        assert torch.equal(layer(many), decoded)  # more rows than the kernel is for
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (layer, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert {k for k, v in other.state_dict().items() if not torch.equal(v, stored[k])} == set()
            assert torch.equal(other(x), y)
        assert torch.equal(layer.double().codes, stored["codes"])
        assert torch.equal(layer.float()(x), y)


@weight_only
def test_a_used_layer_loads_and_lends_itself():
    layer, other, x = coded4(), coded4(seed=7), gaussian(3, 128, seed=1)
    with torch.no_grad():
        mine, theirs = layer(x), other(x)
        state = other.state_dict()
        assert torch.equal(torch.func.functional_call(layer, state, x), theirs)
        assert torch.equal(layer(x), mine)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), theirs)
        layer.load_state_dict(coded4().state_dict(), assign=True)
        assert torch.equal(layer(x), mine)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.dense_weight().sum(0), rtol=LAYERS32, atol=LAYERS32)


@weight_only
def test_what_is_exported_is_decoded_in_any_order_and_what_is_compiled_has_the_kernel():
    layer, x = coded4(), gaussian(3, 128, seed=1)
    expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    with torch.inference_mode():
        by_kernel = layer(x)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(exported, expected)
    assert torch.equal(compiled, by_kernel)


@weight_only
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_int4_kernel_does_not_hide_nan_and_infinity(value):
    layer, x = coded4(), gaussian(3, 128)
    x[1, 3] = value
    with torch.no_grad():
        y = layer(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_processors_whose_order_of_codes_is_unknown_decode(capability):
    script = (
        "import torch; from lowrank.nn.integer_matmul import *\n"
        "from lowrank.linalg.quantization import unpack_int4\n"
        "codes = torch.randint(256, (112, 64), dtype=torch.uint8)\n"
        "print(torch.backends.cpu.get_cpu_capability(),"
        " why_no_int4_kernel(112, 128, 32, codes.device) is None,"
        " torch.equal(unpacked(packed(codes), 112, 128), unpack_int4(codes)))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    name, works, same = found.stdout.split()
    assert works == ("True" if name.startswith("AVX") else "False")
    assert same == "True" or works == "False"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_cuda_computes_what_the_cpu_does(rows, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_ON_CUDA", 0)
    for made in (smoothed()[0], QuantizedLinear.from_weight(gaussian(48, 64), None, Scheme("int8"))):
        x = gaussian(rows, 64)
        with torch.no_grad():
            here = made(x)
            made.cuda()
            assert made.runs_on() == "int8"
            there = made(x.cuda())
        assert there.device.type == "cuda"
        assert (there.cpu() - here).norm() < 0.003 * here.norm()
        assert made(x.cuda().half()).dtype == torch.float16


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tells_from_where_on_integers_multiply():
    layer = QuantizedLinear(4096, 1024, False, Scheme("int8"), device="cuda")
    assert layer.runs_on() == "int8 (from 1,024 tokens)"
    assert QuantizedLinear(4096, 1001, False, Scheme("int8"), device="cuda").runs_on() == "dequantized"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(8, 32, 32), (48, 64, 64), (104, 96, 32), (64, 512, 256)]
)
def test_cuda_multiplies_int4_as_the_decoded_weight_does(rows, columns, size, tokens, dtype):
    layer = coded4(rows, columns, size)
    stored, weight = layer.codes.clone(), layer.dense_weight().cuda().double()
    layer.cuda().to(dtype)
    x = gaussian(tokens, columns, seed=1).cuda().to(dtype)
    exact = nn.functional.linear(x.double(), weight, layer.bias.double())
    with torch.no_grad():
        y = layer(x)
        assert layer.runs_on() == "int4 (up to 64 tokens)"
        assert layer.codes.ndim == 4  # in the kernel's order
        assert layer.codes.nbytes == stored.nbytes
        assert y.dtype == dtype
        assert (y.double() - exact).norm() < 0.008 * exact.norm()
        assert torch.equal(layer.state_dict()["codes"].cpu(), stored)
        many = gaussian(200, columns, seed=2).cuda().to(dtype)
        assert torch.equal(layer(many), copy.deepcopy(layer)(many))  # dequantized from either order
        assert torch.equal(layer.cpu().codes, stored)

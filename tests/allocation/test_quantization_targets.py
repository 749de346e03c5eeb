"""Which weights become integers, and whether there is a kernel for them."""

import copy
import warnings

import pytest
import torch
from bert_outputs import quantized_modules
from torch import nn

import lowrank
from lowrank import compress, quantize
from lowrank.errors import (
    SchemeError,
    SlowKernelWarning,
)
from lowrank.nn.integer_matmul import why_no_int4_kernel


def test_a_head_that_is_ignored_keeps_its_table_as_it_is(tiny_bert):
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(tiny_bert.config).eval()
    quantize(model, ignore=["*.decoder"])
    assert "bert.embeddings.word_embeddings" not in quantized_modules(model)
    assert "bert.embeddings.position_embeddings" in quantized_modules(model)


def test_a_layer_that_is_called_down_is_not_mistaken_for_a_factor():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(64, 32)

        def forward(self, x):
            return self.down(x)

    model = nn.Sequential(Block(), nn.Linear(32, 32))
    stats = lowrank.calibrate(model, [torch.randn(64, 64) for _ in range(4)])
    quantize(model, stats=stats)
    assert model[0].down.smooth_scale is not None
    assert model[0].down.input_shift is not None


def narrow():
    """Two layers, of which one has a number of outputs that no int4 kernel takes."""
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 20))


def test_int4_without_a_kernel_warns_once_or_refuses_as_was_chosen():
    x = torch.randn(3, 64)
    with pytest.warns(SlowKernelWarning, match="have to be dequantized") as caught:
        small = quantize(narrow(), "int4", targets=["*"])
    (told,) = [w for w in caught if w.category is SlowKernelWarning]
    kernel = why_no_int4_kernel(64, 64, 32, torch.device("cpu")) is None
    assert f"{1 if kernel else 2} int4 weights of linear layers have to be dequantized" in str(told.message)
    assert "since the kernel wants outputs in multiples of 16 (the first: 1)" in str(told.message)
    assert small[1].runs_on() == "dequantized"
    untouched = narrow()
    with pytest.raises(SchemeError, match=r"dequantized at every call.*on_missing_kernel='allow'"):
        quantize(untouched, "int4", targets=["*"], on_missing_kernel="refuse")
    assert type(untouched[1]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(narrow(), "int4", targets=["*"], on_missing_kernel="allow")(x)
        quantize(narrow(), "int8", targets=["*"], on_missing_kernel="refuse")(x)
    with pytest.raises(
        SchemeError, match=r"on_missing_kernel='quietly': give one of 'warn', 'refuse', 'allow'"
    ):
        quantize(narrow(), "int4", targets=["*"], on_missing_kernel="quietly")


def test_factors_without_a_kernel_are_refused_before_they_are_made():
    model = nn.Sequential(nn.Linear(128, 136), nn.Linear(136, 128))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(SchemeError, match=r"1 int4 weights .* since .* \(the first: 0.up\)"):
        compress(model, rank=32, quantize="int4", on_missing_kernel="refuse", ignore=["1"])
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_layers_that_read_constants_are_coded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    nn.init.zeros_(model[0].weight)  # so that the last layer reads the same at each token
    inputs = torch.randn(50, 32)
    expected = model(inputs).detach()
    stats = lowrank.calibrate(model, [inputs])
    small = compress(copy.deepcopy(model), rank=4, stats=stats, quantize="int8")
    assert (small(inputs) - expected).norm() < 0.05 * expected.norm()
    for scheme in ("int8", "int4"):
        quantized = quantize(copy.deepcopy(model), scheme, stats=stats)
        assert (quantized(inputs) - expected).norm() < 0.05 * expected.norm()


def test_a_group_larger_than_any_row_is_refused():
    with pytest.raises(SchemeError, match="no row has so many elements"):
        lowrank.plan(nn.Sequential(nn.Linear(64, 64)), keep=0.5, quantize="int4", group_size=10**30)

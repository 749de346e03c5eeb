"""`LowRankLinear` stands in for every dense layer that it can be made from."""

import pytest
import torch
from closeness import FEW32
from conformance import IN, OUT, RANK, LinearConformance, inputs
from torch import nn

from lowrank import LowRankLinear, RankError, WeightError
from lowrank.nn import layer_type_named, layer_type_of


class _FromLinear(LinearConformance):
    bias: bool

    def dense(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Linear(IN, OUT, bias=self.bias)

    def compress(self, dense, rank):
        return LowRankLinear.from_linear(dense, rank)


class TestFromLinearWithBias(_FromLinear):
    bias = True


class TestFromLinearWithoutBias(_FromLinear):
    bias = False


class _FromConv1D(LinearConformance):
    bias: bool

    def dense(self) -> nn.Module:
        pytest.importorskip("transformers.modeling_utils")  # with it comes the plug-in that knows Conv1D
        from transformers.pytorch_utils import Conv1D

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = Conv1D(OUT, IN)
            nn.init.normal_(layer.bias)
        if not self.bias:
            layer.register_parameter("bias", None)
        return layer

    def compress(self, dense, rank):
        return LowRankLinear.from_linear(dense, rank)

    def test_the_kind_is_remembered(self, layer):
        assert layer.layer_type == "conv1d"
        assert layer_type_of(self.dense()) is layer_type_named("conv1d")


class TestFromConv1DWithBias(_FromConv1D):
    bias = True


class TestFromConv1DWithoutBias(_FromConv1D):
    # Conv1D itself cannot run without a bias, so the factors are compared with x W instead
    bias = False

    def test_full_rank_equals_the_dense_output(self):
        dense = self.dense()
        x = inputs(5, IN)
        torch.testing.assert_close(self.compress(dense, OUT)(x), x @ dense.weight, rtol=0, atol=FEW32)


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


def test_the_bias_is_shared_with_the_source(linear):
    assert LowRankLinear.from_linear(linear, RANK).bias is linear.bias


def test_factors_are_contiguous(linear):
    layer = LowRankLinear.from_linear(linear, RANK)
    assert layer.up.weight.is_contiguous() and layer.down.weight.is_contiguous()


def test_factors_are_wrapped_without_copying():
    left, right = torch.randn(OUT, RANK), torch.randn(RANK, IN)
    layer = LowRankLinear.from_factors(left, right)
    assert layer.up.weight.data_ptr() == left.data_ptr()
    assert layer.down.weight.data_ptr() == right.data_ptr()
    assert layer.bias is None


def test_the_children_are_plain_linear_layers(linear):
    layer = LowRankLinear.from_linear(linear, RANK)
    assert [(n, type(m)) for n, m in layer.named_children()] == [("down", nn.Linear), ("up", nn.Linear)]
    assert layer.down.bias is None


@pytest.mark.parametrize("rank", [0, -1, OUT + 1])
def test_a_constructor_with_an_impossible_rank_says_the_range(rank):
    with pytest.raises(RankError, match=rf"rank {rank} of a layer \(out={OUT}, in={IN}\).*from 1 to {OUT}"):
        LowRankLinear(IN, OUT, rank)


@pytest.mark.parametrize("rank", [2.5, 2.0, True, "4", None], ids=repr)
def test_a_constructor_with_a_rank_that_is_no_int_says_so(rank):
    with pytest.raises(RankError, match="whole number"):
        LowRankLinear(IN, OUT, rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_constructor_takes_dtype_and_device(dtype):
    layer = LowRankLinear(IN, OUT, RANK, dtype=dtype, device="meta")
    assert {(t.dtype, t.device.type) for t in layer.state_dict().values()} == {(dtype, "meta")}


def test_only_exact_linear_types_are_taken():
    with pytest.raises(WeightError, match="Bilinear is not a linear layer"):
        LowRankLinear.from_linear(nn.Bilinear(3, 4, 5), 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_weight_that_is_not_finite_is_refused(linear, value):
    with torch.no_grad():
        linear.weight[2, 3] = value
    with pytest.raises(WeightError, match=r"1 of 384 values that are NaN or infinite"):
        LowRankLinear.from_linear(linear, RANK)


def test_a_weight_without_data_is_refused():
    with pytest.raises(WeightError, match="meta device"):
        LowRankLinear.from_linear(nn.Linear(IN, OUT, device="meta"), RANK)


def test_a_weight_of_zeros_gives_zeros(linear):
    nn.init.zeros_(linear.weight)
    layer = LowRankLinear.from_linear(linear, RANK)
    assert torch.equal(layer(inputs(3, IN)), linear.bias.expand(3, OUT))
    assert layer.relative_error == 0.0


def test_the_result_does_not_depend_on_the_global_seed_nor_change_it(linear):
    torch.manual_seed(1)
    first = LowRankLinear.from_linear(linear, RANK)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(2)
    second = LowRankLinear.from_linear(linear, RANK)
    assert torch.equal(first.up.weight, second.up.weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_layer_stays_on_its_device(linear):
    layer = LowRankLinear.from_linear(linear.cuda(), RANK)
    assert {t.device.type for t in layer.state_dict().values()} == {"cuda"}
    x = inputs(5, IN)
    torch.testing.assert_close(layer(x.cuda()).cpu(), layer.cpu()(x))

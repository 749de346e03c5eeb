"""What every layer that stands in for a linear one must do.

A test class for such a layer inherits from `LinearConformance` and says how to make one::

    class TestMyLayer(LinearConformance):
        def dense(self) -> nn.Module: ...                  # a layer of IN → OUT, on a fixed seed
        def compress(self, dense, rank) -> nn.Module: ...  # what is tested

Every statement compares with the dense layer, or with the product of the factors.
"""

import copy

import pytest
import torch
from closeness import SUMS32
from torch import Tensor, nn

from lowrank import RankError

IN, OUT, RANK = 24, 16, 4
RESOLUTION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Compare up to the resolution of a dtype, relative to the largest value."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=RESOLUTION[dtype] * scale, check_stride=False
    )


class LinearConformance:
    """Inherit, and give `dense` and `compress`."""

    def dense(self) -> nn.Module:
        raise NotImplementedError

    def compress(self, dense: nn.Module, rank: int) -> nn.Module:
        raise NotImplementedError

    @pytest.fixture
    def layer(self) -> nn.Module:
        return self.compress(self.dense(), RANK)

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute the output in float64 from the dense product of the factors."""
        output = x.double() @ layer.dense_weight().detach().double().T
        return output if layer.bias is None else output + layer.bias.detach().double()

    @pytest.mark.parametrize(
        "shape", [(IN,), (5, IN), (2, 3, IN), (2, 3, 5, IN)], ids=["1d", "2d", "3d", "4d"]
    )
    def test_output_is_the_product_of_the_factors(self, layer, shape):
        x = inputs(*shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], OUT) and y.dtype == x.dtype
        assert_near(y.detach(), self.product(layer, x))

    def test_an_empty_batch_gives_an_empty_output(self, layer):
        assert layer(torch.zeros(0, IN)).shape == (0, OUT)
        assert layer(torch.zeros(2, 0, IN)).shape == (2, 0, OUT)

    def test_a_wrong_input_size_raises_as_in_a_dense_layer(self, layer):
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
            layer(inputs(5, IN + 1))

    def test_full_rank_equals_the_dense_output(self):
        dense = self.dense()
        x = inputs(5, IN)
        assert_near(self.compress(dense, OUT)(x).detach(), dense(x).detach())

    def test_the_error_of_the_weight_is_the_optimum(self):
        dense = self.dense()
        weight = dense.weight.detach().double()
        weight = weight if weight.shape == (OUT, IN) else weight.T
        layer = self.compress(dense, RANK)
        optimum = torch.linalg.svdvals(weight)[RANK:].norm() / weight.norm()
        error = (weight - layer.dense_weight().detach().double()).norm() / weight.norm()
        assert float(optimum) * (1 - 1e-6) <= float(error) <= float(optimum) * (1 + 1e-5)
        assert layer.relative_error == pytest.approx(float(error), rel=SUMS32)

    def test_the_source_is_not_changed(self):
        dense = self.dense()
        before = {name: p.detach().clone() for name, p in dense.state_dict().items()}
        self.compress(dense, RANK)
        assert all(torch.equal(before[name], p) for name, p in dense.state_dict().items())
        assert type(dense) is type(self.dense())

    @pytest.mark.parametrize("rank", [0, -1, OUT + 1, 2.0, True, "4", None], ids=repr)
    def test_a_rank_out_of_range_is_refused(self, rank):
        with pytest.raises(RankError, match=f"give a whole number from 1 to {OUT}"):
            self.compress(self.dense(), rank)

    def test_sizes_and_attributes_answer_as_those_of_a_linear_layer(self, layer):
        assert (layer.in_features, layer.out_features, layer.rank) == (IN, OUT, RANK)
        assert layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
        assert layer.weight.numel() == 0
        assert layer.dense_weight().shape == (OUT, IN)

    def test_the_bias_is_the_dense_layers(self):
        dense = self.dense()
        layer = self.compress(dense, RANK)
        assert (layer.bias is None) == (dense.bias is None)
        if dense.bias is not None:
            assert torch.equal(layer.bias, dense.bias) and isinstance(layer.bias, nn.Parameter)

    def test_it_has_fewer_parameters(self, layer):
        bias = 0 if layer.bias is None else OUT
        assert sum(p.numel() for p in layer.parameters()) == RANK * (IN + OUT) + bias

    def test_repr_names_sizes_rank_and_bias(self, layer):
        text = f"in_features={IN}, out_features={OUT}, rank={RANK}, bias={layer.bias is not None}"
        assert layer.extra_repr() == text
        assert text in repr(nn.Sequential(layer))

    def test_the_state_dict_makes_the_round_trip(self, layer):
        other = self.compress(self.dense(), RANK)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(layer.state_dict(), strict=True)
        x = inputs(5, IN)
        assert torch.equal(other(x), layer(x))

    def test_a_dense_state_dict_fails_loudly(self, layer):
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*size mismatch for weight"):
            layer.load_state_dict(self.dense().state_dict())

    def test_its_state_dict_fails_loudly_in_a_dense_layer(self, layer):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            self.dense().load_state_dict(layer.state_dict(), strict=False)

    def test_a_state_dict_of_another_rank_fails_loudly(self, layer):
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict(self.compress(self.dense(), RANK + 1).state_dict())

    def test_a_deep_copy_is_equal_and_independent(self, layer):
        was_copy = copy.deepcopy(layer)
        x = inputs(5, IN)
        expected = layer(x).detach().clone()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        assert torch.equal(was_copy(x), expected)
        assert (was_copy.rank, was_copy.relative_error) == (layer.rank, layer.relative_error)

    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_the_training_mode_is_taken_over(self, mode):
        layer = self.compress(self.dense().train(mode), RANK)
        assert {module.training for module in layer.modules()} == {mode}

    def test_gradients_are_those_of_the_formula(self, layer):
        layer = layer.double()
        x = inputs(3, IN, dtype=torch.float64).requires_grad_()
        parameters = list(layer.parameters())
        assert all(p.requires_grad for p in parameters)

        def call(x: Tensor, *values: Tensor) -> Tensor:
            named = dict(zip(dict(layer.named_parameters()), values, strict=True))
            return torch.func.functional_call(layer, named, (x,))

        assert torch.autograd.gradcheck(call, (x, *parameters))

    def test_frozen_factors_pass_gradients_on(self, layer):
        layer.requires_grad_(False)
        x = inputs(3, IN).requires_grad_()
        layer(x).sum().backward()
        assert x.grad.abs().sum() > 0
        assert all(p.grad is None for p in layer.parameters())

    @pytest.mark.parametrize("dtype", list(RESOLUTION), ids=str)
    def test_it_converts_to_other_dtypes(self, layer, dtype):
        converted = layer.to(dtype)
        assert {p.dtype for p in converted.parameters()} == {converted.weight.dtype} == {dtype}
        x = inputs(5, IN, dtype=dtype)
        assert converted(x).dtype == dtype
        assert_near(converted(x).detach(), self.product(converted.double(), x), dtype)

    @pytest.mark.parametrize("dtype", list(RESOLUTION), ids=str)
    def test_a_dense_layer_of_any_dtype_keeps_its_dtype(self, dtype):
        layer = self.compress(self.dense().to(dtype), RANK)
        assert {p.dtype for p in layer.parameters()} == {layer.weight.dtype} == {dtype}

    def test_half_and_float_shortcuts_work(self, layer):
        assert layer.half().weight.dtype == torch.float16
        assert layer.bfloat16()(inputs(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert layer.float()(inputs(2, IN)).dtype == torch.float32

    def test_autocast_computes_in_bfloat16(self, layer):
        x = inputs(5, IN)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert_near(y.detach(), self.product(layer, x), torch.bfloat16)

    def test_it_moves_to_the_meta_device_and_back_as_empty(self, layer):
        meta = layer.to("meta")
        assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
        assert meta.weight.device.type == "meta"
        assert meta(torch.zeros(5, IN, device="meta")).shape == (5, OUT)
        assert meta.to_empty(device="cpu")(inputs(5, IN)).shape == (5, OUT)

    def test_it_can_be_made_on_the_meta_device_and_filled(self, layer):
        with torch.device("meta"):
            empty = type(layer)(IN, OUT, RANK, bias=layer.bias is not None)
        assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
        empty.load_state_dict(layer.state_dict(), assign=True)
        x = inputs(5, IN)
        assert torch.equal(empty(x), layer(x))

    def test_torch_compile_takes_it_in_one_graph(self, layer):
        x = inputs(5, IN)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_near(compiled(x).detach(), layer(x).detach())

    @pytest.mark.long
    def test_torch_compile_with_inductor_agrees(self, layer):
        x = inputs(5, IN)
        assert_near(torch.compile(layer, fullgraph=True)(x).detach(), layer(x).detach())

    def test_torch_export_keeps_the_outputs_for_any_batch(self, layer):
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(layer.eval(), (inputs(5, IN),), dynamic_shapes=({0: batch},))
        x = inputs(7, IN)
        assert_near(program.module()(x).detach(), layer(x).detach())

    def test_it_works_in_vmap(self, layer):
        x = inputs(5, IN)
        assert_near(torch.vmap(layer)(x).detach(), layer(x).detach())

"""Why a layer must stay dense."""

import re

import pytest
import torch
from blocked_layers import Holder, Scaled, blocked, targeted
from torch import nn
from torch.nn import functional

from lowrank import LowRankLinear, compress
from lowrank.inspection.eligibility import ineligible_layers
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft


def test_a_layer_used_under_two_names_stays_dense_under_both():
    shared = nn.Linear(32, 32)
    model = Holder(one=shared, two=shared)
    assert blocked(model, "one") == "is used twice, also as two"
    assert blocked(model, "two") == "is used twice, also as one"
    assert targeted(model) == {"first", "last"}


def test_a_block_used_under_two_names_keeps_the_layers_inside():
    block = nn.Sequential(nn.Linear(32, 32))
    assert blocked(Holder(one=block, two=block), "two.0") == "is used twice, also as one.0"


def test_a_tied_weight_stays_dense_on_both_sides():
    model = Holder(embedding=nn.Embedding(50, 32), decoder=nn.Linear(32, 50), twin=nn.Linear(32, 32))
    model.decoder.weight = model.embedding.weight
    model.twin.weight = model.first.weight
    assert draft(Inspection(model))["decoder"].reason == "shares its weight with embedding.weight (tied)"
    assert blocked(model, "twin") == "shares its weight with first.weight (tied)"
    assert blocked(model, "first") == "shares its weight with twin.weight (tied)"
    assert targeted(model) == {"last"}


def test_a_tied_bias_stays_with_dense_layers():
    """Under a calibrated metric it takes up the mean of one layer's error, and the other's is another."""
    model = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16), "own": nn.Linear(16, 16)})
    model["second"].bias = model["first"].bias
    assert blocked(model, "first") == "shares its bias with second.bias (tied)"
    assert blocked(model, "second") == "shares its bias with first.bias (tied)"
    assert targeted(model) == {"own"}


@pytest.mark.parametrize(
    ("module", "layers"),
    [
        (nn.MultiheadAttention(32, 4), ["m.out_proj"]),
        (
            nn.TransformerEncoderLayer(32, 4, 64),
            ["m.self_attn.out_proj", "m.linear1", "m.linear2"],
        ),
        (nn.TransformerDecoderLayer(32, 4, 64), ["m.self_attn.out_proj", "m.multihead_attn.out_proj"]),
    ],
    ids=["attention", "encoder-layer", "decoder-layer"],
)
def test_torch_s_attention_reads_weights_by_value_and_stays_dense(module, layers):
    model = Holder(m=module)
    for name in layers:
        assert re.search(
            r"read by value in \w+|may compute something else than nn.Linear", blocked(model, name)
        )


def test_the_decoder_layer_calls_its_feed_forward_layers_and_they_shrink():
    model = Holder(m=nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0)).eval()
    assert {"m.linear1", "m.linear2"} <= targeted(model)
    dense = [model.m.linear1.weight.detach().clone(), model.m.linear2.weight.detach().clone()]
    compress(model, rank=4)
    assert isinstance(model.m.linear1, LowRankLinear)
    tokens, memory = torch.randn(2, 5, 3, 32)
    assert model.m(tokens, memory).isfinite().all()
    assert dense[0].shape == model.m.linear1.dense_weight().shape


def test_torch_s_encoder_still_runs_when_what_surrounds_it_is_compressed():
    model = nn.Sequential(nn.Linear(32, 32), nn.TransformerEncoderLayer(32, 4, 64), nn.Linear(32, 32)).eval()
    compress(model, rank=4)
    with torch.inference_mode():  # the fast path, which reads the weights
        assert model(torch.randn(5, 2, 32)).shape == (5, 2, 32)
    assert type(model[1].linear1) is nn.Linear


def test_a_subclass_of_linear_stays_dense_since_it_may_compute_something_else():
    assert blocked(Holder(scaled=Scaled(32, 32)), "scaled") == (
        "is a Scaled, which may compute something else than nn.Linear"
    )


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=["int8", "uint8", "fp8"]
)
def test_a_quantized_weight_stays_dense(dtype):
    model = Holder(quantized=nn.Linear(32, 32))
    model.quantized.weight = nn.Parameter(model.quantized.weight.detach().to(dtype), requires_grad=False)
    assert (
        blocked(model, "quantized")
        == f"has a weight of {dtype}, not floating point; it may be quantized already"
    )


def test_a_parametrized_weight_stays_dense():
    model = Holder(normed=nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)))
    assert "normed" not in targeted(model)
    assert draft(Inspection(model))["normed"].reason


def test_a_pruned_weight_which_is_no_parameter_stays_dense():
    from torch.nn.utils import prune

    model = Holder(pruned=nn.Linear(32, 32))
    prune.l1_unstructured(model.pruned, "weight", 0.5)
    assert "not a plain parameter" in blocked(model, "pruned")


def test_a_forward_replaced_on_the_instance_stays_dense():
    model = Holder(offloaded=nn.Linear(32, 32))
    model.offloaded.forward = lambda input: input
    assert "forward replaced on the instance" in blocked(model, "offloaded")


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.called = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(functional.linear(x, self.proj.weight, self.proj.bias))


class ByTranspose(ByValue):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x @ self.proj.weight.T)


class InOwnMethod(ByValue):
    def project(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return functional.linear(y, self.proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(self.project(x))


class Inherited(ByValue):
    pass


class ByType(ByValue):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.proj.weight.dtype).to(self.proj.weight.device)
        return self.called(self.proj(x))


class OnlyType(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.to(self.proj.weight.dtype).to(self.proj.weight.device))


@pytest.mark.parametrize(
    "reader", [ByValue, ByTranspose, InOwnMethod, Inherited], ids=lambda cls: cls.__name__
)
def test_a_weight_that_the_parent_multiplies_by_stays_dense(reader):
    model = Holder(m=reader())
    assert blocked(model, "m.proj") == f"has its weight read by value in {reader.__name__}"
    assert targeted(model) == {"first", "m.called", "last"}


def test_a_model_that_reads_its_own_child_by_value_keeps_it():
    assert blocked(ByValue(), "proj") == "has its weight read by value in ByValue"


def test_a_weight_of_which_only_dtype_and_device_are_read_may_shrink_and_the_model_runs():
    model = OnlyType().eval()
    assert targeted(model) == {"proj"}
    compress(model, rank=4)
    assert isinstance(model.proj, LowRankLinear)
    assert model(torch.zeros(2, 32)).shape == (2, 32)


def test_an_inherited_method_that_reads_by_value_counts_though_overridden_since_super_may_call_it():
    assert blocked(Holder(m=ByType()), "m.proj") == "has its weight read by value in ByType"


def test_one_layer_called_many_times_at_one_name_may_shrink():
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=50, embedding_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=128,
    )  # fmt: skip
    model = AlbertModel(config).eval()
    group = "encoder.albert_layer_groups.0.albert_layers.0"
    assert {f"{group}.attention.query", f"{group}.ffn", f"{group}.ffn_output"} <= targeted(model)
    compress(model, rank=8)
    calls = []
    model.get_submodule(f"{group}.ffn").register_forward_hook(lambda *_: calls.append(1))
    assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()
    assert len(calls) == 3


def test_all_layers_of_a_plain_model_are_eligible(mlp, tiny_bert):
    assert ineligible_layers(Inspection(mlp)) == {}
    assert ineligible_layers(Inspection(tiny_bert)) == {}

"""Sequential calibration: against ridge regression on all tokens at once, and on models end to end."""

import copy
import dataclasses

import pytest
import torch
from closeness import CANCELLED32, LAYERS32
from residual_models import bert, gpt2, hidden, ids, llama
from torch import nn
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
)

import lowrank
from lowrank import DataError, LowRankError, PlanError, apply, calibrate, compress, plan
from lowrank.linalg.ridge import Regression
from lowrank.nn import LowRankLinear


class Block(nn.Module):
    """A residual block; ``how`` says in which way the output enters the stream."""

    def __init__(self, how: str = "add", size: int = 12) -> None:
        super().__init__()
        self.how = how
        self.norm, self.first, self.second = nn.LayerNorm(size), nn.Linear(size, 24), nn.Linear(24, size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        y = self.second(self.first(self.norm(x)).tanh())
        if self.how == "add":
            return x + y
        if self.how == "dropout":
            return self.norm(self.dropout(y) + x)
        if self.how == "in place":
            x = x.clone()
            x += y
            return x
        if self.how == "normalized":
            return x + self.norm(y)
        return y  # no stream


class Model(nn.Module):
    def __init__(self, how: str = "add", blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block(how) for _ in range(blocks)))
        self.end = nn.Linear(12, 4)
        self.eval()

    def forward(self, x):
        return self.end(self.blocks(x))


def rows(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=generator)
    return [torch.randn(64, 12, generator=torch.Generator().manual_seed(i)) @ mixing for i in range(count)]


def distance(model, other, data):
    with torch.no_grad():
        return sum(float((model(x) - other(x)).square().sum()) for x in data)


@pytest.mark.parametrize("how", ["add", "dropout", "in place", "none"])
def test_the_factor_is_the_ridge_regression_of_all_tokens(how, monkeypatch):
    monkeypatch.setattr("lowrank.surgery.sequential.RIDGES", (0.05, 0.05))
    dense, data = Model(how, blocks=2), rows()
    stats = calibrate(dense, data)
    decided = plan(dense, rank=4, stats=stats, targets=["blocks.1.second", "blocks.0.first"])
    before = apply(copy.deepcopy(dense), decided, stats)
    small = apply(copy.deepcopy(dense), decided, stats, sequential=True, data=data)

    x = torch.cat(data)
    with torch.no_grad():
        here, there = small.blocks[0](x), dense.blocks[0](x)
        read = small.blocks[1].first(small.blocks[1].norm(here)).tanh()
        y = dense.blocks[1].second(dense.blocks[1].first(dense.blocks[1].norm(there)).tanh())
        weight = torch.ones(len(x), dtype=torch.float64)
        if how != "none":
            weight = 1 / (y + there).double().square().mean(1)
            y = y + there - here
        layer = small.blocks[1].second
        z, y = (read @ layer.down.weight.T).double(), y.double()
        left = before.blocks[1].second.up.weight.double()
        share = weight[:, None] / weight.sum()
        z0, y0 = (share * z).sum(0), (share * y).sum(0)
        zz = (z - z0).T @ (share * (z - z0))
        yz = (y - y0).T @ (share * (z - z0))
        added = 0.05 * torch.diag(zz.diagonal())
        expected = torch.linalg.solve(zz + added, (yz + left @ added).T).T
    torch.testing.assert_close(layer.up.weight.double(), expected, rtol=CANCELLED32, atol=LAYERS32)
    torch.testing.assert_close(layer.bias.double(), y0 - expected @ z0, rtol=CANCELLED32, atol=LAYERS32)
    assert not torch.equal(small.blocks[0].first.up.weight, dense.blocks[0].first.weight)


@pytest.mark.parametrize("how", ["add", "dropout", "in place"])
def test_layers_make_up_for_the_layers_before_them(how):
    dense, data, fresh = Model(how), rows(), rows(12)[8:]
    stats = calibrate(dense, data)
    decided = plan(dense, rank=5, stats=stats)
    alone = apply(copy.deepcopy(dense), decided, stats)
    together = apply(copy.deepcopy(dense), decided, stats, sequential=True, data=data)
    assert distance(together, dense, fresh) < 0.9 * distance(alone, dense, fresh)


def test_a_layer_that_nothing_is_lost_before_keeps_its_factor_where_that_is_best():
    """Under the metric "inputs" the factor is the regression already."""
    dense, data = Model("none", blocks=2), rows()
    stats = calibrate(dense, data, loss=None)
    decided = plan(dense, rank=4, stats=stats, targets=["blocks.0.first"])
    alone = apply(copy.deepcopy(dense), decided, stats)
    together = apply(copy.deepcopy(dense), decided, stats, sequential=True, data=data)
    torch.testing.assert_close(
        together.blocks[0].first.up.weight, alone.blocks[0].first.up.weight, rtol=CANCELLED32, atol=LAYERS32
    )


def assert_nearer_and_saved(dense, decided, stats, data, folder):
    """Assert that going block by block helps, and that a checkpoint of that is exact."""
    alone = apply(copy.deepcopy(dense), decided, stats)
    small = apply(copy.deepcopy(dense), decided, stats, sequential=True, data=data)
    wanted = hidden(dense)
    assert (hidden(small) - wanted).norm() < (hidden(alone) - wanted).norm()
    small.save_pretrained(folder)
    assert torch.equal(hidden(type(dense).from_pretrained(folder)), hidden(small))


@pytest.mark.parametrize("share", [None, "inputs"])
@pytest.mark.parametrize("build", [bert, llama])
def test_models_of_transformers_come_nearer_to_the_dense_one(build, share, tmp_path):
    dense, data = build(), ids(32)
    stats = calibrate(dense, data)
    decided = plan(dense, rank=8, stats=stats, add_bias=True, share=share)
    assert_nearer_and_saved(dense, decided, stats, data, tmp_path)


def test_a_narrower_weight_is_the_ridge_regression_of_all_tokens(monkeypatch):
    monkeypatch.setattr("lowrank.surgery.sequential.RIDGES", (0.05, 0.05))
    dense, data = Model(blocks=2), rows()
    stats = calibrate(dense, data)
    decided = plan(dense, keep=0.5, stats=stats, forms=["neurons"], inputs=data[0], round_to=1)
    before = apply(copy.deepcopy(dense), decided, stats)
    small = apply(copy.deepcopy(dense), decided, stats, sequential=True, data=data)
    layer, prior = small.blocks[1].second, before.blocks[1].second.weight.double()
    assert layer.in_features == decided["blocks.1.second"].kept_inputs

    x = torch.cat(data)
    with torch.no_grad():
        here, there = small.blocks[0](x), dense.blocks[0](x)
        z = small.blocks[1].first(small.blocks[1].norm(here)).tanh().double()
        total = dense.blocks[1](there).double()
        share = 1 / total.square().mean(1, keepdim=True)
        share, y = share / share.sum(), total - here
        z0, y0 = (share * z).sum(0), (share * y).sum(0)
        zz = (z - z0).T @ (share * (z - z0))
        added = 0.05 * torch.diag(zz.diagonal())
        yz = (y - y0).T @ (share * (z - z0))
        expected = torch.linalg.solve(zz + added, (yz + prior @ added).T).T
    torch.testing.assert_close(layer.weight.double(), expected, rtol=CANCELLED32, atol=LAYERS32)
    torch.testing.assert_close(layer.bias.double(), y0 - expected @ z0, rtol=CANCELLED32, atol=LAYERS32)
    with pytest.raises(LowRankError, match="has factorized or narrower layers"):
        apply(before, decided, stats, sequential=True, data=data)


@pytest.mark.parametrize("forms", [["neurons"], ["factors", "pivoted", "neurons"]], ids=str)
@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_models_that_lose_neurons_come_nearer_to_the_dense_one(build, forms, tmp_path):
    dense, data = build(), ids(32)
    stats = calibrate(dense, data)
    decided = plan(dense, keep=0.5, stats=stats, forms=forms, inputs=data[0])
    assert any(layer.is_narrower for layer in decided)
    assert_nearer_and_saved(dense, decided, stats, data, tmp_path)


def test_neurons_between_blocks_are_refused():
    dense, data = Model(blocks=2), rows()
    stats = calibrate(dense, data)
    decided = plan(dense, keep=0.5, stats=stats, forms=["neurons"], inputs=data[0], round_to=1)
    width = decided["blocks.0.second"].kept_inputs
    broken = decided.with_layers(
        {
            "blocks.0.first": dataclasses.replace(
                decided["blocks.0.first"], feeds="blocks.1.second", kept_outputs=width
            ),
            "blocks.0.second": decided["blocks.0.second"].dense("stays"),
            "blocks.1.first": decided["blocks.1.first"].dense("stays"),
            "blocks.1.second": dataclasses.replace(decided["blocks.1.second"], kept_inputs=width),
        }
    )
    with pytest.raises(PlanError, match=r"first: loses neurons that blocks\.1\.second reads, which is in"):
        apply(dense, broken, stats, sequential=True, data=data)
    assert dense.blocks[0].first.out_features == 24


def test_compress_does_it_in_one_call_also_with_an_iterator():
    dense, data = bert(), ids()
    first = compress(copy.deepcopy(dense), keep=0.5, data=data, sequential=True)
    second = compress(copy.deepcopy(dense), keep=0.5, data=iter(data), sequential=True)
    third = compress(copy.deepcopy(dense), keep=0.5, data=data, stats=calibrate(dense, data), sequential=True)
    assert torch.equal(hidden(first), hidden(second))
    assert torch.equal(hidden(first), hidden(third))


def test_an_interrupt_leaves_a_model_that_works(monkeypatch):
    model = bert()
    calls, solve = [], Regression.solve

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 10:  # in the first block
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(Regression, "solve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(model, keep=0.5, data=ids(), sequential=True)
    assert hidden(model).isfinite().all()
    assert model.config.quantization_config is not None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_bad_requests_change_nothing():
    model, data = bert(), ids()
    before = hidden(model)
    stats = calibrate(model, data)
    decided = plan(model, keep=0.5, stats=stats)
    with pytest.raises(DataError, match="sequential=True goes with data="):
        apply(model, decided, stats, sequential=True)
    with pytest.raises(DataError, match="data= goes with nothing else"):
        apply(model, decided, stats, data=data)
    with pytest.raises(DataError, match="no batch"):
        apply(model, decided, stats, sequential=True, data=[])
    with pytest.raises(DataError, match="Batch 1: BertModel refuses it"):
        apply(model, decided, stats, sequential=True, data=[data[0], {"nonsense": torch.ones(1)}, *data])
    with pytest.raises(LowRankError, match="either data or stats"):
        compress(model, keep=0.5, stats=stats, data=data)
    with pytest.raises(LowRankError, match="a stack of repeated blocks, and Sequential has none"):
        compress(nn.Sequential(nn.Linear(32, 32)), rank=4, data=[torch.randn(8, 32)], sequential=True)
    with pytest.raises(DataError, match="needs 4 batches or more"):
        apply(model, decided, stats, sequential=True, data=data[:3])
    with pytest.raises(LowRankError, match="there is no such folder"):
        apply(model, decided, stats, sequential=True, data=data, offload_folder="/nowhere/at/all")
    other = Model("normalized")
    with pytest.raises(DataError, match="without it, leave it out"):
        apply(model, decided, stats, offload_folder="/tmp")
    with pytest.raises(LowRankError, match="this model scales or normalizes it first"):
        compress(other, keep=0.5, data=rows(), sequential=True, round_to=1)
    for untouched in (model, other):
        assert not any(isinstance(module, LowRankLinear) for module in untouched.modules())
    assert torch.equal(hidden(model), before)
    apply(model, dataclasses.replace(decided, layers=decided.factorized[:1]), stats)
    with pytest.raises(LowRankError, match="needs the dense model"):
        apply(model, decided, stats, sequential=True, data=data)


def test_a_factor_across_blocks_is_refused():
    """The decoder's cross-attention reads one tensor, the encoder's output, in every block."""
    torch.manual_seed(0)
    size = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 100}
    model = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)).eval()
    data = [dict(batch, decoder_input_ids=batch["input_ids"]) for batch in ids()]
    with pytest.raises(PlanError, match="which is in another block"):
        compress(model, rank=4, data=data, share="inputs", sequential=True)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    with torch.no_grad():
        wanted = model(**data[0]).logits
        compress(model, keep=0.5, data=data, sequential=True)
        assert model(**data[0]).logits.isfinite().all() and not torch.equal(model(**data[0]).logits, wanted)


class Outside(Model):
    """The stream runs outside of the blocks."""

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.end(x)


class Twice(Model):
    """The stack is gone through twice."""

    def forward(self, x):
        return self.end(self.blocks(self.blocks(x) / 2))


class Linears(nn.Module):
    """The blocks are linear layers themselves."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Outside("none"), "before block 1 the model does something else with it"),
        (Twice, "called once each, in the order"),
        (Linears, "these are linear layers themselves"),
    ],
    ids=["stream-outside", "twice", "linear-layers"],
)
def test_stacks_that_cannot_be_followed_are_refused_untouched(build, message):
    model = build()
    with pytest.raises(LowRankError, match=message):
        compress(model, keep=0.5, data=rows(), loss=None, sequential=True, round_to=1)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


class Routed(nn.Module):
    """A mixture of experts: which tokens reach an expert depends on the hidden states."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.out = nn.Linear(12, 12)

    def forward(self, x):
        flat = x.reshape(-1, 12)
        routed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            chosen = (flat.sum(-1) > 0) == bool(number)
            routed[chosen] += expert(flat[chosen])
        return x + self.out(routed).view(x.shape)


def test_experts_stay_and_flattened_tokens_are_masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 12), nn.Sequential(Routed(), Routed())).eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids)

    data = [dict(batch, attention_mask=torch.ones(4, 16, dtype=torch.long)) for batch in ids()]
    for batch in data:
        batch["attention_mask"][:, 9:] = 0
    stats = calibrate(Net(), data, loss=None)
    assert stats.moments("inner.1.0.out").weight == 8 * 4 * 9
    small = compress(Net(), keep=0.6, data=data, loss=None, sequential=True, round_to=1)
    with torch.no_grad():
        assert small(**data[0]).isfinite().all()


def test_what_was_fitted_is_told():
    small = compress(bert(), keep=0.5, data=ids(), sequential=True)
    decided = lowrank.Plan.from_dict(small.config.quantization_config.plan)
    for layer in decided.factorized:
        fitted = "fitted anew" in layer.reason
        assert fitted == (layer.relative_error is None)
        assert not fitted or layer.name.endswith("output.dense")
    assert any("fitted anew" in layer.reason for layer in decided)


def test_lowrank_report_still_adds_up():
    small = compress(bert(), keep=0.5, data=ids(), sequential=True)
    assert lowrank.report(small).parameters == sum(p.numel() for p in small.parameters())

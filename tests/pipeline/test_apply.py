"""A plan is carried out, and `decompress` gives back what was there."""

import copy
import json
import re

import pytest
import torch
from bert_states import assert_untouched, dense_weights, frobenius_errors, snapshot
from closeness import LAYERS32, SUMS32
from saved_models import built
from tied_tables import every_family, every_way, llama, logits, made_small
from torch import nn

import lowrank
from lowrank import (
    CheckpointError,
    LowRankLinear,
    Plan,
    apply,
    compress,
    decompress,
    plan,
)
from lowrank.errors import LowRankError, PlanError, TargetError


def test_editing_the_table_edits_the_head():
    model = built(llama)
    plan = lowrank.plan(model, rank=16, targets=["*", "*embed_tokens"])
    edited = plan.with_rank("*embed_tokens", 8)
    assert (edited["lm_head"].rank, edited["lm_head"].tied_to) == (8, "model.embed_tokens")
    assert edited.with_rank("*", None)["lm_head"].tied_to == "model.embed_tokens"
    with pytest.raises(TargetError, match=r"lm_head: has the rank of model\.embed_tokens"):
        plan.with_rank("lm_head", 8)


def test_a_plan_that_forgets_the_head_is_refused():
    model = built(llama)
    plan = lowrank.plan(model, rank=16, targets=["*embed_tokens"])
    lonely = Plan.from_dict({**plan.to_dict(), "layers": [plan.to_dict()["layers"][0]]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=r"changes this embedding, but not lm_head, which is tied to it"):
        lowrank.apply(model, lonely)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


@every_way
@every_family
def test_decompress_gives_the_tie_back(build, table, head, how):
    dense = built(build)
    small = made_small(copy.deepcopy(dense), table, how)
    expected = logits(small)
    ties = dense._tied_weights_keys, dense.all_tied_weights_keys
    lowrank.decompress(small)
    assert type(small.get_submodule(table)) is nn.Embedding
    assert type(small.get_submodule(head)) is nn.Linear
    assert small.get_submodule(head).weight is small.get_submodule(table).weight
    assert (small._tied_weights_keys, small.all_tied_weights_keys) == ties
    assert (logits(small) - expected).norm() < 0.02 * expected.norm()
    small.resize_token_embeddings(107)
    assert small.get_submodule(head).weight is small.get_submodule(table).weight
    assert small.get_submodule(head).out_features == 107


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tied_to": "model.layers.0.mlp.up_proj"}, "which has another shape: 128 rows of 64"),
        ({"tied_to": "model.norm"}, "which is no embedding or linear layer here"),
        ({"tied_to": "nowhere"}, "which is no embedding or linear layer here"),
        ({"in_features": 32}, "the model's is"),
    ],
    ids=["a-layer", "a-norm", "nothing", "another-shape"],
)
def test_a_tie_that_was_changed_is_refused(change, message, tmp_path):
    small = made_small(built(llama), "model.embed_tokens", "factors")
    small.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    (entry,) = [x for x in config["quantization_config"]["plan"]["layers"] if x["name"] == "lm_head"]
    entry.update(change)
    if "tied_to" in change:
        config["tie_word_embeddings"] = False  # else the class says what it is tied to
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        type(small).from_pretrained(tmp_path)


def test_decompress_refuses_hooks_on_factors_which_would_be_lost(mlp):
    compress(mlp, rank=8)
    handle = mlp[2].down.register_forward_hook(lambda *_: None)
    before = snapshot(mlp)
    with pytest.raises(LowRankError, match=r"2\.down: has hooks, .* Remove them first"):
        decompress(mlp)
    assert_untouched(mlp, before)
    handle.remove()
    decompress(mlp)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"]
)
def test_decompress_gives_linear_layers_of_the_same_outputs(mlp, dtype):
    mlp = mlp.to(dtype)
    keys, shapes = list(mlp.state_dict()), [p.shape for p in mlp.parameters()]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    compress(mlp, rank=8)
    small = mlp(x)
    assert decompress(mlp) is mlp
    assert [type(module) for module in mlp] == [nn.Linear, nn.GELU, nn.Linear]
    assert list(mlp.state_dict()) == keys
    assert [p.shape for p in mlp.parameters()] == shapes
    assert all(p.dtype == dtype for p in mlp.parameters())
    # Both sum 96 products in another order, and the weight is rounded once more.
    atol = 10 * torch.finfo(dtype).eps * float(small.detach().abs().max())
    torch.testing.assert_close(mlp(x), small, rtol=0, atol=atol)


def test_decompress_gives_conv1d_back_to_gpt2():
    from transformers import GPT2Config, GPT2Model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=2)).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = dense_weights(model)
    compress(model, rank=8)
    errors = frobenius_errors(model, weights)
    assert len(errors) == 4
    assert all(0 < error < 1 for error in errors.values())
    with torch.no_grad():
        small = model(torch.tensor([[1, 2, 3]])).last_hidden_state
        decompress(model)
        again = model(torch.tensor([[1, 2, 3]])).last_hidden_state
    assert all(type(model.get_submodule(name)) is Conv1D for name in errors)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    torch.testing.assert_close(again, small, rtol=0, atol=SUMS32 * float(small.abs().max()))


def test_decompress_leaves_a_dense_model_alone(mlp):
    before = snapshot(mlp)
    decompress(mlp)
    assert_untouched(mlp, before)


def test_decompress_refuses_a_model_that_is_a_low_rank_layer_itself():
    layer = LowRankLinear.from_linear(nn.Linear(64, 32), rank=8)
    before = snapshot(layer)
    with pytest.raises(LowRankError, match="is itself a LowRankLinear"):
        decompress(layer)
    assert_untouched(layer, before)


def test_a_plan_can_be_applied_twice_and_the_second_time_changes_nothing(mlp):
    decided = plan(mlp, rank=8)
    apply(mlp, decided)
    before = snapshot(mlp)
    apply(mlp, decided)
    assert_untouched(mlp, before)


def test_a_plan_with_another_rank_for_a_factorized_layer_is_refused_with_advice(mlp):
    decided = plan(mlp, rank=8)
    apply(mlp, decided)
    before = snapshot(mlp)
    message = r"2: factorized already, at rank 8; the plan says 4.*decompress\(model\) first"
    with pytest.raises(PlanError, match=re.compile(message, re.DOTALL)):
        apply(mlp, decided.with_rank("2", 4))
    assert_untouched(mlp, before)


def test_decompress_and_compress_at_a_lower_rank_is_the_best_of_the_product(mlp):
    compress(mlp, rank=16)
    decompress(mlp)
    weight = mlp[0].weight.detach().double()
    values = torch.linalg.svdvals(weight)
    compress(mlp, rank=4, targets=["0"])
    error = frobenius_errors(mlp, {"0": weight})["0"]
    assert error == pytest.approx(float(values[4:].norm() / values.norm()), rel=LAYERS32)


def test_a_hand_edited_plan_is_carried_out_as_edited(tiny_bert):
    decided = Plan.from_json(plan(tiny_bert, rank=8).to_json())
    decided = decided.with_rank("*.query", 3).with_rank("*.key", None).with_rank("pooler.dense", 5)
    apply(tiny_bert, decided)
    ranks = {n: m.rank for n, m in tiny_bert.named_modules() if isinstance(m, LowRankLinear)}
    assert ranks == {layer.name: layer.rank for layer in decided.factorized}
    assert ranks["pooler.dense"] == 5
    assert {rank for name, rank in ranks.items() if name.endswith("query")} == {3}
    assert not [name for name in ranks if name.endswith("key")]

"""Embeddings with the heads that are tied to them, from a model to a checkpoint and back."""

import copy

import pytest
import torch
import transformers
from saved_models import built
from tied_tables import (
    FAMILIES,
    IDS,
    ROWS,
    are_one,
    batches_of,
    every_family,
    every_way,
    llama,
    logits,
    made_small,
)
from torch import nn

import lowrank
from lowrank import (
    LowRankEmbedding,
    QuantizedEmbedding,
    compress,
    quantize,
    report,
)
from lowrank.errors import BudgetError, TargetError
from lowrank.linalg import truncated_svd
from lowrank.reports.evaluation import loss_increase


def test_tables_are_listed_only_where_a_target_spells_them(tiny_bert):
    table = "embeddings.word_embeddings"
    assert table not in lowrank.plan(tiny_bert, keep=0.5)
    assert table not in lowrank.plan(tiny_bert, keep=0.5, targets=["*"])
    for pattern in (table, "*.word_embeddings", "*embed*", "*word_embed*"):
        assert lowrank.plan(tiny_bert, rank=16, targets=[pattern])[table].rank == 16, pattern
    both = lowrank.plan(tiny_bert, keep=0.5, targets=["*", "*.word_embeddings"])
    assert [x.name for x in both if x.is_embedding] == [table]
    assert len(both) == len(lowrank.plan(tiny_bert, keep=0.5)) + 1


@every_family
def test_naming_the_head_names_the_table(build, table, head):
    model = built(build)
    assert lowrank.plan(model, rank=16, targets=[head]) == lowrank.plan(model, rank=16, targets=[table])


@every_family
def test_a_head_that_is_ignored_keeps_its_table(build, table, head):
    plan = lowrank.plan(built(build), rank=16, targets=["*", f"*{table}"], ignore=[head])
    assert plan[head].rank is None
    assert plan[table].rank is None
    assert plan[table].reason == f"is tied to {head}, which is ignored"


def test_a_table_that_must_stay_is_an_error_where_it_is_named():
    model = nn.Sequential(nn.Embedding(50, 32, max_norm=1.0), nn.Linear(32, 32))
    with pytest.raises(TargetError, match=r"the embedding 0 cannot be factorized: it has a max_norm"):
        lowrank.plan(model, rank=4, targets=["0"])
    t5 = transformers.T5Config(vocab_size=ROWS, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    with pytest.raises(TargetError, match=r"the embedding shared cannot be factorized: it shares its weight"):
        lowrank.plan(transformers.T5ForConditionalGeneration(t5), rank=8, targets=["shared"])


def test_a_table_has_no_latency_to_choose_by(tiny_bert):
    with pytest.raises(BudgetError, match=r"word_embeddings: an embedding is looked up, not multiplied"):
        lowrank.plan(tiny_bert, speedup=1.5, inputs=IDS, targets=["*.word_embeddings"])


@every_way
@every_family
def test_a_checkpoint_gives_the_same_bits_in_every_way(build, table, head, how, tmp_path):
    small = made_small(built(build), table, how)
    expected = logits(small)
    small.save_pretrained(tmp_path / "one")
    again = type(small).from_pretrained(tmp_path / "one").eval()
    again.save_pretrained(tmp_path / "two")
    lowrank.save(small, tmp_path / "three")
    for loaded in (
        again,
        type(small).from_pretrained(tmp_path / "two").eval(),
        lowrank.load(tmp_path / "three"),
    ):
        assert torch.equal(logits(loaded.eval()), expected)
        assert are_one(loaded, table, head)
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert size == report(small).checkpoint_bytes
    base = transformers.AutoModel.from_pretrained(tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, small.base_model(IDS).last_hidden_state)


@every_way
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_checkpoint_gets_a_tied_head(name, how, tmp_path):
    build, table, head = FAMILIES[name]
    small = made_small(built(build), table, how)
    small.base_model.save_pretrained(tmp_path)
    whole = type(small).from_pretrained(tmp_path).eval()
    assert are_one(whole, table, head)
    assert torch.equal(logits(whole), logits(small))


@every_way
def test_any_other_model_is_saved_and_loaded(how, tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, 64, padding_idx=0), nn.Linear(64, 64), nn.Linear(64, ROWS))
        model[2].weight = model[0].weight
        return model

    small = fresh()
    small = compress(small, rank=32, targets=["0"]) if how.startswith("factors") else small
    small = quantize(small, how.rpartition("+")[2]) if how != "factors" else small
    expected = small(IDS)
    folder = lowrank.save(small, tmp_path / "small")
    loaded = lowrank.load(folder, model=fresh())
    assert torch.equal(loaded(IDS), expected)
    assert are_one(loaded, "0", "2")
    stored = report(small).checkpoint_bytes
    assert (folder / "model.safetensors").stat().st_size == stored


def test_the_report_counts_the_table_once():
    dense = built(llama)
    small = made_small(copy.deepcopy(dense), "model.embed_tokens", "factors")
    told, before = report(small), report(dense)
    assert told.parameters_before == before.parameters
    assert told.parameters == sum(p.numel() for p in small.parameters())
    rows = {layer.name: layer for layer in told.layers}
    assert rows["model.embed_tokens"].parameters == 32 * (ROWS + 64)
    assert (rows["lm_head"].parameters, rows["lm_head"].bytes) == (0, 0)
    assert rows["lm_head"].macs == 32 * (ROWS + 64)
    assert rows["model.embed_tokens"].macs == 32 * 64
    assert "embeddings" in str(told)
    assert told.checkpoint_bytes_before == pytest.approx(before.checkpoint_bytes, rel=0.01)


def test_a_padding_row_of_zeros_stays_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, 64, padding_idx=5), nn.Linear(64, 8))
    small = compress(model, rank=16, targets=["0"])
    assert small[0].bias is None
    assert not bool(small[0](torch.tensor([5])).any())
    quantize(small)
    assert not bool(small[0](torch.tensor([5])).any())


def test_other_tables_are_centred():
    """One rank more would be needed for the mean row else, whatever the embedding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, 64), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight += 5 * torch.randn(64)
    weight = model[0].weight.detach().clone()
    small = compress(model, rank=16, targets=["0"])
    lost = (small[0].dense_weight() - weight).norm()
    plain = truncated_svd(weight, 16)
    better = truncated_svd(weight, 17)
    assert (weight - better.left @ better.right).norm() * 0.999 <= lost
    assert lost < (weight - plain.left @ plain.right).norm()
    assert lowrank.plan(lowrank.decompress(small), rank=16, targets=["0"])["0"].parameters == 16 * (ROWS + 64)


def test_recovery_trains_the_factors_of_a_table():
    dense = built(llama)
    small = compress(copy.deepcopy(dense), rank=8, targets=["*embed_tokens"])
    data = batches_of(12)
    before, start = loss_increase(small, dense, data), small.model.embed_tokens.down.weight.detach().clone()
    lowrank.recover(small, dense, data, steps=60, learning_rate=3e-3)
    assert loss_increase(small, dense, data) < before
    assert not torch.equal(small.model.embed_tokens.down.weight, start)
    assert are_one(small, "model.embed_tokens", "lm_head")


def test_block_by_block_goes_with_tables():
    dense = built(llama)
    small = compress(
        copy.deepcopy(dense), rank=16, data=batches_of(8), targets=["*", "*embed_tokens"], sequential=True
    )
    assert are_one(small, "model.embed_tokens", "lm_head")
    assert isinstance(small.model.embed_tokens, LowRankEmbedding)


def test_a_config_asks_for_tables_too(tmp_path):
    dense = built(llama)
    dense.save_pretrained(tmp_path)
    config = lowrank.LowRankConfig(rank=16, targets=["*", "*embed_tokens"])
    small = type(dense).from_pretrained(tmp_path, quantization_config=config).eval()
    assert torch.equal(logits(small), logits(compress(dense, rank=16, targets=["*", "*embed_tokens"])))


def test_tables_that_are_factorized_are_coded_by_another_call():
    small = made_small(built(llama), "model.embed_tokens", "factors")
    before = logits(small)
    quantize(small, targets=["*embed_tokens"])
    assert isinstance(small.model.embed_tokens.down, QuantizedEmbedding)
    assert (logits(small) - before).norm() < 0.02 * before.norm()
    assert are_one(small, "model.embed_tokens", "lm_head")


def test_recovery_goes_through_the_coded_factors_of_a_table():
    dense = built(llama)
    small = compress(copy.deepcopy(dense), rank=32, targets=["*embed_tokens"])
    quantize(small, "int4", targets=["*embed_tokens"])
    data = batches_of(12)
    before = loss_increase(small, dense, data)
    lowrank.recover(small, dense, data, steps=60, learning_rate=3e-3)
    assert loss_increase(small, dense, data) <= before
    assert isinstance(small.model.embed_tokens.down, QuantizedEmbedding)

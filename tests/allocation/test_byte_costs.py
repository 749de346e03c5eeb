"""A budget in bytes holds for the whole file."""

import pytest
import torch
from saved_models import built
from tied_tables import are_one, batches_of, llama, logits

import lowrank
from lowrank import (
    LowRankEmbedding,
    compress,
    plan,
)
from lowrank.errors import BudgetError


def test_a_budget_of_bytes_holds_for_the_whole_file():
    dense = built(llama)
    limit = sum(p.numel() * 4 for p in dense.parameters()) * 6 // 10
    small = compress(dense, max_bytes=limit, targets=["*", "*embed_tokens"])
    assert isinstance(small.model.embed_tokens, LowRankEmbedding)
    assert sum(p.numel() * 4 for p in small.parameters()) <= limit


@pytest.mark.parametrize(
    "targets", [None, ["*", "*embed_tokens"]], ids=["embedding-as-rest", "embedding-as-target"]
)
@pytest.mark.parametrize("correction", [False, True], ids=["codes", "correction"])
@pytest.mark.parametrize("quantize", ["int8", "int4", "auto"])
def test_a_budget_of_bytes_counts_coded_tables(targets, correction, quantize, tmp_path):
    dense = built(llama)
    limit = 90_000 if quantize != "int4" else 70_000
    stats = lowrank.calibrate(dense, batches_of(4), targets=targets)
    ask = {"quantize": quantize, "correction": correction, "targets": targets, "stats": stats}
    plan = lowrank.plan(dense, max_bytes=limit, **ask)
    assert plan["lm_head"].tied_to == "model.embed_tokens"
    small = compress(dense, max_bytes=limit, **ask)
    tensors = [*small.parameters(), *small.buffers()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= limit
    assert are_one(small, "model.embed_tokens", "lm_head")
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(type(small).from_pretrained(tmp_path).eval()), logits(small))


@pytest.mark.parametrize("fraction", [0.6, 0.8])
def test_max_bytes_is_met_by_the_whole_model(mlp, mlp_stats, fraction):
    def size(model):
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    limit = int(fraction * size(mlp))
    compress(mlp, max_bytes=limit, stats=mlp_stats)
    assert 0.8 * limit < size(mlp) <= limit


def test_max_bytes_that_cannot_be_met_names_the_least(mlp, mlp_stats):
    with pytest.raises(BudgetError, match=r"still needs [\d,]+ bytes"):
        plan(mlp, max_bytes=1000, stats=mlp_stats)

"""A head refers to its table, in copies, in training, and through checkpoints."""

import copy

import pytest
import torch
from saved_models import built
from tied_tables import IDS, ROWS, are_one, every_family, every_way, logits, made_small, masked_lm

import lowrank
from lowrank import (
    LowRankError,
    Plan,
)


@every_family
def test_the_head_has_the_rank_of_its_table_and_no_parameters(build, table, head):
    plan = lowrank.plan(built(build), rank=16, targets=[table])
    assert (plan[head].rank, plan[head].tied_to, plan[head].parameters) == (16, table, 0)
    assert plan.kept_fraction == 16 * (ROWS + 64) / (ROWS * 64)  # the tied weight counts once
    assert f"uses the weight of {table}" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


@every_way
@every_family
def test_the_tie_survives_copies_and_tie_weights(build, table, head, how):
    small = made_small(built(build), table, how)
    expected = logits(small)
    twin = copy.deepcopy(small)
    for model in (small, twin):
        model.tie_weights()
        assert are_one(model, table, head)
        assert torch.equal(logits(model), expected)
    assert twin.get_submodule(table) is not small.get_submodule(table)


@every_family
def test_training_moves_both(build, table, head, tmp_path):
    small = made_small(built(build), table, "factors")
    before = logits(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert are_one(small, table, head)
    assert not torch.equal(logits(small), before)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(type(small).from_pretrained(tmp_path).eval()), logits(small))


@every_family
@pytest.mark.parametrize("how", ["factors", "int8"])
def test_resizing_says_what_to_do(build, table, head, how):
    small = made_small(built(build), table, how)
    with pytest.raises(LowRankError, match=r"Call lowrank\.decompress\(model\) first, resize"):
        small.resize_token_embeddings(120)
    with pytest.raises(LowRankError, match=r"Call lowrank\.decompress\(model\) first, resize"):
        small.base_model.resize_token_embeddings(120)


def test_a_head_alone_cannot_be_saved(tmp_path):
    small = made_small(built(masked_lm), "bert.embeddings.word_embeddings", "factors")
    with pytest.raises(LowRankError, match=r"predictions\.decoder: uses the weight of a module outside"):
        lowrank.save(small.cls, tmp_path / "head")
    with pytest.raises(LowRankError, match=r"predictions\.decoder: uses the weight of a module outside"):
        lowrank.decompress(small.cls)

"""What integers lose is predicted."""

import copy

import pytest
from bert_outputs import QUERY
from closeness import SUMS32
from saved_models import built
from tied_tables import llama

import lowrank
from lowrank import (
    Plan,
    quantize,
)
from lowrank.allocation.quantization_losses import quantization_losses_of
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft
from lowrank.plans.storage_formats import FLOAT, storage_formats_of


def test_the_plan_predicts_the_error_that_is_measured(tiny_bert, bert_stats):
    planned = lowrank.plan(tiny_bert, rank=8, correction=True, quantize="int4", stats=bert_stats)
    small = lowrank.apply(tiny_bert, planned, stats=bert_stats)
    for layer in planned.factorized:
        measured = small.get_submodule(layer.name).relative_error
        assert measured <= 1.01 * layer.relative_error  # a second round can only gain
        assert measured > 0.5 * layer.relative_error
    assert Plan.from_json(planned.to_json()) == planned
    assert "correction of rank 8" in str(planned.diff(planned.with_rank(QUERY, None))[0])


def test_the_predicted_loss_of_a_coded_table_is_that_of_its_codes():
    """A whole embedding and its factors, as `allocate` compares them, against the modules that are made."""
    model, table = built(llama), "model.embed_tokens"
    dense = model.model.embed_tokens.weight.detach().clone()
    drafted = draft(Inspection(model), [table])
    found = quantization_losses_of(model, drafted, storage_formats_of("auto"), None, progress=False)
    assert found.pop(FLOAT) == {}
    for form, quantization_errors in found.items():
        coded = quantize(copy.deepcopy(model), form.scheme.name, targets=[table]).model.embed_tokens
        lost = float((coded.dense_weight() - dense).square().sum() / dense.square().sum())
        assert quantization_errors[table].whole == pytest.approx(lost, rel=SUMS32)

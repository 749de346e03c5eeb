"""Bits as a choice: what forms cost in bytes, and which of them the solver takes."""

import copy

import pytest
import torch
from format_sizes import SOME, size

import lowrank
from lowrank import BudgetError, SchemeError, compress
from lowrank.nn import LowRankLinear, QuantizedModule
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.storage_formats import storage_formats_of
from lowrank.plans.stored_tensors import layer_bytes, quantized_bytes


@pytest.mark.parametrize("form", SOME, ids=["float", "int8", "int4", "correction"])
@pytest.mark.parametrize("rank", [None, 32])
@pytest.mark.parametrize("known", [False, True], ids=["plain", "calibrated"])
def test_the_bytes_of_a_form_are_those_of_the_module_it_becomes(mlp, form, rank, known):
    if form.correction and rank is None:
        pytest.skip("a residual has a rank")
    stats = lowrank.calibrate(mlp, [torch.randn(200, 64, generator=torch.Generator().manual_seed(0))])
    layer = LayerPlan("0", "linear", 64, 96, True, rank, correction=form.correction)
    codes = form.quantized(layer, calibrated=known)
    metric = "inputs" if known else "weight"
    planned = lowrank.Plan("Sequential", (layer,), metric=metric, quantized=tuple(codes))
    lowrank.apply(mlp, planned, stats=stats if known else None)
    bias = 96 * 4
    assert layer_bytes(layer, codes, 4) == size(mlp[0]) - bias
    coded = [module for module in mlp[0].modules() if isinstance(module, QuantizedModule)]
    assert sum(map(quantized_bytes, codes)) == sum(module.stored_bytes for module in coded)


def test_without_statistics_the_weights_alone_decide(tiny_bert):
    limit = int(0.25 * size(tiny_bert))
    small = compress(tiny_bert, max_bytes=limit, quantize="auto")
    assert size(small) <= limit
    assert any(isinstance(module, (QuantizedModule, LowRankLinear)) for module in small.modules())


def test_sharing_and_codes_compete_under_one_budget(tiny_bert, bert_stats):
    limit = int(0.24 * size(tiny_bert))
    planned = lowrank.plan(
        tiny_bert, max_bytes=limit, quantize="int8", share="inputs", stats=bert_stats, round_to=4
    )
    small = lowrank.apply(copy.deepcopy(tiny_bert), planned, stats=bert_stats)
    assert size(small) <= limit
    alone = lowrank.plan(tiny_bert, max_bytes=limit, quantize="int8", stats=bert_stats, round_to=4)
    assert planned.loss_increase <= 1.001 * alone.loss_increase


def test_a_budget_that_no_form_meets_says_what_is_the_least(tiny_bert, bert_stats):
    with pytest.raises(BudgetError, match=r"max_bytes=1000 cannot be met.*still needs [\d,]+ bytes"):
        compress(tiny_bert, max_bytes=1000, quantize="auto", stats=bert_stats)


def test_layers_that_are_not_whole_groups_keep_their_other_forms(mlp):
    compress(mlp, max_bytes=int(0.4 * size(mlp)), quantize="auto", group_size=80)  # divides neither 64 nor 96
    assert not any(m.scheme.name == "int4" for m in mlp.modules() if isinstance(m, QuantizedModule))


def test_the_only_form_must_divide_every_layer(mlp):
    with pytest.raises(SchemeError, match="0: rows of 64 elements are not whole groups of 80"):
        compress(mlp, max_bytes=int(0.4 * size(mlp)), quantize="int4", group_size=80)


def test_unknown_forms_are_refused():
    with pytest.raises(SchemeError, match="known schemes are 'int8' and 'int4'"):
        storage_formats_of("int5")
    with pytest.raises(SchemeError, match="one scale per row"):
        storage_formats_of("int8", 32)

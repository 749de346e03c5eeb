"""Bits as a choice: what forms cost in bytes, and which of them the solver takes."""

import copy

import pytest
import torch

import lowrank
from lowrank import BudgetError, SchemeError, compress
from lowrank.allocation.candidates import merged
from lowrank.linalg import Scheme
from lowrank.nn import LowRankLinear, QuantizedModule
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.storage_formats import FLOAT, INT8, StorageFormat, storage_formats_of
from lowrank.plans.stored_tensors import layer_bytes, quantized_bytes
from lowrank.reports.evaluation import loss_increase

INT4 = Scheme("int4", 32)
SOME = [FLOAT, StorageFormat(INT8), StorageFormat(INT4), StorageFormat(INT4, correction=True)]


def size(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.fixture
def stats(tiny_bert):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(8)]
    return lowrank.calibrate(tiny_bert, data)


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


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.25, 0.21])
def test_auto_fits_the_budget_and_predicts_no_more_loss_than_any_single_form(tiny_bert, stats, fraction):
    limit = int(fraction * size(tiny_bert))
    found = {}
    for quantize in ("auto", "int8", "int4", None):
        try:
            found[quantize] = lowrank.plan(
                tiny_bert, max_bytes=limit, quantize=quantize, stats=stats, round_to=4
            )
        except BudgetError:
            assert quantize != "auto"
    for quantize, planned in found.items():
        small = lowrank.apply(copy.deepcopy(tiny_bert), planned, stats=stats)
        assert size(small) <= limit, quantize
        if quantize == "int8":  # what is not targeted there, the tables, is quantized alike at best
            layers = [found["auto"][layer.name].loss_increase or 0.0 for layer in planned.targeted]
            assert sum(layers) <= 1.02 * planned.loss_increase + 1e-9


def test_with_less_room_fewer_bits_are_chosen(tiny_bert, stats):
    def bits(fraction):
        limit = int(fraction * size(tiny_bert))
        planned = lowrank.plan(tiny_bert, max_bytes=limit, quantize="auto", stats=stats, round_to=4)
        names = {layer.name for layer in planned.targeted}
        codes = [c for c in planned.quantized if c.name in names or c.name.rpartition(".")[0] in names]
        return sum(c.rows * c.columns for c in codes if c.scheme == "int4")

    assert bits(0.95) < bits(0.2)


def test_auto_costs_the_loss_less_than_int8_at_the_same_bytes(tiny_bert, stats):
    generator = torch.Generator().manual_seed(7)
    others = [{"input_ids": torch.randint(99, (8, 24), generator=generator)} for _ in range(4)]
    how = {
        "max_bytes": int(0.5 * size(tiny_bert)),
        "stats": stats,
        "round_to": 4,
        "ignore": ["embeddings.*"],
    }
    measured = {}
    for quantize in ("auto", "int8"):
        small = compress(copy.deepcopy(tiny_bert), quantize=quantize, **how)
        measured[quantize] = loss_increase(small, tiny_bert, others)
    assert measured["auto"] < measured["int8"]


def test_without_statistics_the_weights_alone_decide(tiny_bert):
    limit = int(0.25 * size(tiny_bert))
    small = compress(tiny_bert, max_bytes=limit, quantize="auto")
    assert size(small) <= limit
    assert any(isinstance(module, (QuantizedModule, LowRankLinear)) for module in small.modules())


def test_sharing_and_codes_compete_under_one_budget(tiny_bert, stats):
    limit = int(0.24 * size(tiny_bert))
    planned = lowrank.plan(
        tiny_bert, max_bytes=limit, quantize="int8", share="inputs", stats=stats, round_to=4
    )
    small = lowrank.apply(copy.deepcopy(tiny_bert), planned, stats=stats)
    assert size(small) <= limit
    alone = lowrank.plan(tiny_bert, max_bytes=limit, quantize="int8", stats=stats, round_to=4)
    assert planned.loss_increase <= 1.001 * alone.loss_increase


def test_a_budget_that_no_form_meets_says_what_is_the_least(tiny_bert, stats):
    with pytest.raises(BudgetError, match=r"max_bytes=1000 cannot be met.*still needs [\d,]+ bytes"):
        compress(tiny_bert, max_bytes=1000, quantize="auto", stats=stats)


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


def test_a_merged_menu_has_no_point_that_another_beats(tiny_bert, stats):
    from lowrank import CompressionConfig
    from lowrank.allocation.candidates import QuantizationLoss, candidates_of
    from lowrank.allocation.planner import drafted
    from lowrank.inspection.inspection import Inspection
    from lowrank.linalg import ErrorCurve

    layer = drafted(Inspection(tiny_bert), CompressionConfig(metric="weight"), None).targeted[0]
    error_curve = ErrorCurve(torch.linspace(1, 0, 65, dtype=torch.float64) ** 2)
    candidates = [
        candidates_of(
            [layer], [error_curve], [1.0], 8, form, [QuantizationLoss(0.01 * number, 0.001 * number)]
        )
        for number, form in enumerate(SOME[:3])
    ]
    whole = merged(candidates)
    assert (whole.costs[1:] > whole.costs[:-1]).all()
    assert (whole.losses[1:] < whole.losses[:-1]).all()
    for candidate_list in candidates:
        for cost, loss in zip(candidate_list.costs, candidate_list.losses, strict=True):
            assert (whole.losses[whole.costs <= cost] <= loss).any()

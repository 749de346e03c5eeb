"""How a request becomes a plan."""

import copy
import re

import pytest
import torch
from format_sizes import size
from random_tensors import gaussian
from torch import nn

import lowrank
from lowrank import BudgetError, calibrate, compress, plan
from lowrank.reports.evaluation import loss_increase


def test_auto_takes_the_most_that_is_there(mlp, mlp_stats):
    bare = calibrate(mlp, [gaussian(60, 64)], loss=None)
    assert plan(mlp, keep=0.5).metric == "weight"
    assert plan(mlp, keep=0.5, stats=bare).metric == "inputs"
    assert plan(mlp, keep=0.5, stats=mlp_stats).metric == "loss"


def test_a_layer_that_was_not_called_stays_dense_with_the_reason(mlp):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = mlp, nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    made_plan = plan(model := Partly(), keep=0.5, stats=calibrate(model, [gaussian(50, 64)]))
    assert made_plan["unused"].rank is None
    assert made_plan["unused"].reason == "was not called during calibration"


def test_ten_budgets_need_no_further_forward_pass(mlp, mlp_stats, monkeypatch):
    monkeypatch.setattr(nn.Sequential, "forward", lambda *_: pytest.fail("a forward pass"))
    kept = [plan(mlp, keep=keep / 10, stats=mlp_stats).kept_fraction for keep in range(3, 10)]
    assert kept == sorted(kept)


def test_plans_with_loss_survive_json(mlp, mlp_stats):
    from lowrank import Plan

    decided = plan(mlp, keep=0.5, stats=mlp_stats)
    assert Plan.from_json(decided.to_json()) == decided
    assert decided.loss_increase == pytest.approx(sum(layer.loss_increase for layer in decided.factorized))
    assert "Predicted increase of the loss" in str(decided)


@pytest.mark.parametrize("budget", ["error", "energy", "rank"])
def test_a_budget_that_nothing_meets_names_the_nearest_that_works(mlp, mlp_stats, budget):
    hopeless = {"error": 1e-6, "energy": 1 - 1e-9, "rank": 60}[budget]
    nearest = r"(?:error=|energy=|parameters is )([\d.]+\d)"
    with pytest.raises(BudgetError, match=nearest) as caught:
        plan(mlp, stats=mlp_stats, **{budget: hopeless})
    found = re.search(nearest, str(caught.value).split("\n")[-1])
    nearest = float(found[1]) if budget != "rank" else int(found[1])
    assert plan(mlp, stats=mlp_stats, **{budget: nearest}).factorized


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.25, 0.21])
def test_auto_fits_the_budget_and_predicts_no_more_loss_than_any_single_form(tiny_bert, bert_stats, fraction):
    limit = int(fraction * size(tiny_bert))
    found = {}
    for quantize in ("auto", "int8", "int4", None):
        try:
            found[quantize] = lowrank.plan(
                tiny_bert, max_bytes=limit, quantize=quantize, stats=bert_stats, round_to=4
            )
        except BudgetError:
            assert quantize != "auto"
    for quantize, planned in found.items():
        small = lowrank.apply(copy.deepcopy(tiny_bert), planned, stats=bert_stats)
        assert size(small) <= limit, quantize
        if quantize == "int8":  # what is not targeted there, the tables, is quantized alike at best
            layers = [found["auto"][layer.name].loss_increase or 0.0 for layer in planned.targeted]
            assert sum(layers) <= 1.02 * planned.loss_increase + 1e-9


def test_with_less_room_fewer_bits_are_chosen(tiny_bert, bert_stats):
    def bits(fraction):
        limit = int(fraction * size(tiny_bert))
        planned = lowrank.plan(tiny_bert, max_bytes=limit, quantize="auto", stats=bert_stats, round_to=4)
        names = {layer.name for layer in planned.targeted}
        codes = [c for c in planned.quantized if c.name in names or c.name.rpartition(".")[0] in names]
        return sum(c.rows * c.columns for c in codes if c.scheme == "int4")

    assert bits(0.95) < bits(0.2)


def test_auto_costs_the_loss_less_than_int8_at_the_same_bytes(tiny_bert, bert_stats):
    generator = torch.Generator().manual_seed(7)
    others = [{"input_ids": torch.randint(99, (8, 24), generator=generator)} for _ in range(4)]
    how = {
        "max_bytes": int(0.5 * size(tiny_bert)),
        "stats": bert_stats,
        "round_to": 4,
        "ignore": ["embeddings.*"],
    }
    measured = {}
    for quantize in ("auto", "int8"):
        small = compress(copy.deepcopy(tiny_bert), quantize=quantize, **how)
        measured[quantize] = loss_increase(small, tiny_bert, others)
    assert measured["auto"] < measured["int8"]

"""Everything is checked before anything changes."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bert_states import assert_untouched, snapshot
from torch import Tensor, nn

from lowrank import LowRankLinear, apply, compress, plan, quantize
from lowrank.errors import BudgetError, LowRankError, PlanError, RankError, TargetError, WeightError
from lowrank.linalg import choose_solver
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan

LAST = "encoder.layer.1.output.dense"  # the last layer that is swapped; the damage is done here
FIRST = "encoder.layer.0.attention.self.query"


def busy(model: nn.Module) -> nn.Module:
    """Give the model hooks, frozen weights and mixed training flags, all of which must survive."""
    model.train()
    model.get_submodule(FIRST).eval()
    model.get_submodule(LAST).weight.requires_grad_(False)
    model.get_submodule(LAST).register_forward_hook(lambda *_: None)
    model.get_submodule(FIRST).register_forward_pre_hook(lambda *_: None)
    return model


def edit(name: str = LAST, **changes: object) -> Callable[[nn.Module, Plan], Plan]:
    return lambda model, plan: plan.with_layers({name: replace(plan[name], **changes)})


def add(layer: LayerPlan) -> Callable[[nn.Module, Plan], Plan]:
    return lambda model, plan: replace(plan, layers=(*plan.layers, layer))


def set_weight(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Plan], Plan]:
    def damage(model: nn.Module, plan: Plan) -> Plan:
        layer = model.get_submodule(LAST)
        layer.weight = nn.Parameter(change(layer.weight.detach().clone()), requires_grad=False)
        return plan

    return damage


def tie(model: nn.Module, plan: Plan) -> Plan:
    model.get_submodule(LAST).weight = model.get_submodule("encoder.layer.0.output.dense").weight
    return plan


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight[3, 4] = value
        return weight

    return change


BAD = {
    "wrong-shape": (
        edit(in_features=256), PlanError,
        "is for a weight (out=64, in=256), the model's is (out=64, in=128)",
    ),
    "swapped-shape": (edit(in_features=64, out_features=128), PlanError, "is for a weight (out=128, in=64)"),
    "wrong-kind": (edit(layer_type="conv1d"), PlanError, "the plan says conv1d, the model has a Linear"),
    "no-such-layer": (
        add(LayerPlan("encoder.layer.2.dense", "linear", 64, 64, True, 8)),
        PlanError, "encoder.layer.2.dense: BertModel has no such layer. The plan is for BertModel.",
    ),
    "not-a-linear-layer": (
        add(LayerPlan("embeddings.word_embeddings", "linear", 64, 99, False, 8)),
        PlanError, "embeddings.word_embeddings: the plan says linear, the model has a Embedding",
    ),
    "rank-that-does-not-save": (
        edit(rank=50), PlanError,
        f"{LAST}: rank 50 does not save parameters.\n"
        "  The weight (out=64, in=128) has 8,192 parameters; rank 50 needs 9,600.\n"
        "  Use a rank of at most 42, or keep this layer dense.",
    ),
    "rank-beyond-the-shape": (edit(rank=65), PlanError, "rank 65 is above min(out, in) = 64"),
    "nan": (set_weight(put(float("nan"))), WeightError, "1 of 8,192 values that are NaN or infinite"),
    "infinite": (set_weight(put(float("-inf"))), WeightError, "1 of 8,192 values that are NaN or infinite"),
    "meta": (set_weight(lambda w: w.to("meta")), WeightError, "meta device and has no data"),
    "int8": (set_weight(lambda w: w.to(torch.int8)), PlanError, "it has a weight of torch.int8"),
    "tied": (tie, PlanError, "must stay dense: it shares its weight with"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), BAD.values(), ids=BAD)
def test_a_bad_plan_leaves_the_model_untouched_and_names_the_layer(tiny_bert, damage, error, message):
    bad = damage(tiny_bert, plan(tiny_bert, rank=8))
    model = busy(tiny_bert)
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(message)) as caught:
        apply(model, bad)
    assert isinstance(caught.value, LowRankError)
    assert re.match(r"(e\w+)(\.\w+)+: ", str(caught.value))  # encoder… or embeddings…: the layer
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "budget", [{"rank": 8}, {"keep": 0.5}, {"error": 0.8}], ids=["rank", "keep", "error"]
)
def test_a_weight_that_is_not_finite_leaves_the_model_untouched(tiny_bert, budget, value):
    set_weight(put(value))(tiny_bert, None)
    before = snapshot(busy(tiny_bert))
    with pytest.raises(WeightError, match=rf"{re.escape(LAST)}: The weight has 1 of 8,192 values"):
        compress(tiny_bert, **budget)
    assert_untouched(tiny_bert, before)


@pytest.mark.parametrize("budget", [{"rank": 8}, {"keep": 0.5}], ids=["rank", "keep"])
def test_a_model_on_the_meta_device_is_refused_before_anything_changes(budget):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = snapshot(model)
    with pytest.raises(WeightError, match=r"0: The weight is on the meta device.*Load the weights first"):
        compress(model, **budget)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({}, BudgetError, "exactly one budget"),
        ({"rank": 8, "keep": 0.5}, BudgetError, r"got rank=8 and keep=0\.5"),
        ({"keep": 1.0}, BudgetError, r"^keep=1\.0: "),
        ({"rank": 0}, RankError, "^rank: 0 is not positive"),
        ({"rank": 1000}, BudgetError, "rank=1000, no layer of BertModel would change"),
        ({"rank": 65, "targets": [FIRST]}, RankError, rf"^{re.escape(FIRST)}: rank 65 is above .* = 64 "),
        ({"rank": 8, "targets": ["*.nothing"]}, TargetError, r'^"\*\.nothing" matches none'),
        ({"keep": 0.01}, BudgetError, r"^keep=0\.01 leaves .* Use keep="),
        ({"rank": 8, "tolerance": 0}, LowRankError, "^tolerance=0: "),
        ({"rank": 8, "seed": "one"}, LowRankError, "^seed='one': "),
    ],
    ids=[
        "no-budget", "two-budgets", "keep-1", "rank-0", "rank-1000", "rank-above-named", "no-target",
        "keep-tiny", "tolerance-0", "seed-text",
    ],
)  # fmt: skip
def test_a_bad_request_leaves_the_model_untouched(tiny_bert, request_, error, message):
    # One layer is large enough for the randomized solver, and comes last: only there the seed is read.
    model = busy(tiny_bert)
    model.add_module("late", nn.Linear(520, 520))
    assert choose_solver(520, 520, 8) == "randomized"
    before = snapshot(model)
    with pytest.raises(error, match=message):
        compress(model, **request_)
    assert_untouched(model, before)


def test_a_model_made_in_inference_mode_is_refused_before_anything_changes():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    before = snapshot(model)
    for call in (compress, lambda model, rank: quantize(model)):
        with pytest.raises(WeightError, match=r"0\.weight: was made in inference mode"):
            call(model, rank=4)
    assert_untouched(model, before)
    with torch.inference_mode():
        compress(model, rank=4)
    assert isinstance(model[0], LowRankLinear)


@pytest.mark.parametrize(
    "budget",
    [{"rank": 4}, {"keep": 0.2}, {"error": 0.9}, {"rank": {"*": 4}}, {"rank": 4, "targets": [FIRST]}],
    ids=["rank", "keep", "error", "mapping", "named"],
)
def test_compressing_a_compressed_model_is_refused_with_advice(tiny_bert, budget):
    compress(tiny_bert, rank=8)
    before = snapshot(tiny_bert)
    with pytest.raises(
        LowRankError, match=r"is factorized already, at rank 8; decompress\(model\) undoes that"
    ):
        compress(tiny_bert, **budget)
    assert_untouched(tiny_bert, before)


@pytest.mark.parametrize("call", [compress, plan], ids=["compress", "plan"])
@pytest.mark.parametrize(
    "first",
    [
        lambda model: compress(model, rank=8, targets=["*.query"]),
        lambda model: quantize(model, targets=["*.query"]),
    ],
    ids=["factorized", "quantized"],
)
@pytest.mark.parametrize(
    "request_", [{"keep": 0.5}, {"rank": 4}, {"rank": 4, "targets": ["*.query", "*.key"]}], ids=str
)
def test_compressing_what_was_left_of_a_model_is_refused_and_says_what_to_do(
    tiny_bert, call, first, request_
):
    first(tiny_bert)
    before = snapshot(tiny_bert)
    layers = 4 if "targets" in request_ else 12
    message = (
        rf"BertModel is compressed already: of {layers} layers .*, 2 are factorized or quantized \(the "
        rf"first: "
        r"encoder\.layer\.0\.attention\.self\.query\).*decompress\(model\) first.*targets=.*ignore="
    )
    with pytest.raises(BudgetError, match=message):
        call(tiny_bert, **request_)
    assert_untouched(tiny_bert, before)
    call(tiny_bert, rank=4, ignore=["*.query"])

"""Budgets become ranks: against brute force, and with every promise checked on the factors."""

import pytest
import torch
from closeness import ROOTS64
from drafts import drafted, select, weight
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank import compress, plan
from lowrank.config import CompressionConfig
from lowrank.errors import BudgetError, LowRankError, RankError, TargetError
from lowrank.linalg import error_curve
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan

layer_shapes = st.tuples(st.integers(8, 40), st.integers(8, 40), st.floats(0, 1.5))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@given(
    shapes=st.lists(layer_shapes, min_size=1, max_size=4),
    keep=st.floats(0.05, 0.95),
    round_to=st.integers(1, 4),
)
def test_keep_is_never_exceeded(allocation, shapes, keep, round_to):
    weights = {f"layer{i}": weight(m, n, decay, i) for i, (m, n, decay) in enumerate(shapes)}
    draft, error_curves = drafted(**weights)
    try:
        chosen = select(draft, {"keep": keep}, error_curves, allocation=allocation, round_to=round_to)
    except BudgetError:
        return
    assert chosen.kept_fraction <= keep
    for layer in chosen.factorized:
        assert layer.rank % round_to == 0
        assert layer.rank <= layer.break_even_rank


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_keep_is_not_exceeded_where_a_small_layer_needs_more_than_its_share(allocation):
    # The smallest rank of 12×12 keeps 83 % of it; 100×100 can keep half of itself exactly, at rank 25.
    draft, error_curves = drafted(large=weight(100, 100), small=weight(12, 12))
    chosen = select(draft, {"keep": 0.5}, error_curves, allocation=allocation, round_to=5)
    assert chosen.kept_fraction <= 0.5


def total_loss(chosen: Plan) -> float:
    return sum((layer.relative_error or 0) ** 2 * layer.dense_parameters for layer in chosen)


@pytest.mark.parametrize("keep", [0.2, 0.35, 0.5, 0.7])
def test_the_global_allocation_loses_less_than_the_uniform_one(keep):
    draft, error_curves = drafted(
        flat=weight(64, 64, 0), steep=weight(64, 128, 2, 1), wide=weight(32, 200, 0.7, 2)
    )
    budget = {"keep": keep}
    best, baseline = (
        select(draft, budget, error_curves, allocation=allocation, round_to=1)
        for allocation in ("global", "uniform")
    )
    assert total_loss(best) < total_loss(baseline)
    assert best.kept_fraction <= keep


def test_the_uniform_allocation_keeps_the_same_fraction_of_every_layer():
    draft, error_curves = drafted(flat=weight(64, 64, 0), steep=weight(64, 128, 2, 1))
    chosen = select(draft, {"keep": 0.5}, error_curves, allocation="uniform", round_to=1)
    for layer in chosen:
        assert (
            layer.parameters_at(layer.rank)
            <= 0.5 * layer.dense_parameters
            < layer.parameters_at(layer.rank + 1)
        )


@pytest.mark.parametrize("round_to", [1, 4, 8, 16])
@pytest.mark.parametrize(
    "budget", [{"keep": 0.4}, {"energy": 0.8}, {"error": 0.5}], ids=["keep", "energy", "error"]
)
def test_chosen_ranks_are_multiples_and_say_which(budget, round_to):
    draft, error_curves = drafted(a=weight(64, 128), b=weight(96, 64, 1, 1))
    chosen = select(draft, budget, error_curves, round_to=round_to)
    assert chosen.factorized
    assert all(layer.rank % round_to == 0 for layer in chosen.factorized)
    assert chosen.round_to == round_to


@pytest.mark.parametrize("rank", [1, 7, 13])
def test_an_explicit_rank_is_taken_exactly(rank):
    draft, error_curves = drafted(a=weight(64, 128), b=weight(96, 64))
    chosen = select(draft, {"rank": rank}, error_curves, round_to=8)
    assert [layer.rank for layer in chosen] == [rank, rank]
    assert [layer.reason for layer in chosen] == ["as asked", "as asked"]


def test_an_explicit_rank_needs_no_spectra_and_then_predicts_nothing():
    draft, _ = drafted(a=weight(64, 128))
    assert select(draft, {"rank": 3}, {})["a"].relative_error is None


@given(
    bound=st.floats(0.05, 0.95), decay=st.floats(0, 1.5), rows=st.integers(4, 60), columns=st.integers(4, 60)
)
def test_error_takes_the_smallest_rank_that_meets_it_or_says_why_not(bound, decay, rows, columns):
    draft, error_curves = drafted(a=weight(rows, columns, decay))
    values = torch.linalg.svdvals(weight(rows, columns, decay).double())
    errors = [float(values[k:].norm() / values.norm()) for k in range(len(values) + 1)]
    room = 1 + CompressionConfig(error=bound).tolerance  # for what the solver may lose beside the optimum
    needed = next(k for k in range(1, len(errors)) if errors[k] <= bound / room)
    if needed > draft["a"].break_even_rank:
        with pytest.raises(BudgetError, match=f"needs rank {needed}, which would not save parameters"):
            select(draft, {"error": bound}, error_curves, round_to=1)
    else:
        layer = select(draft, {"error": bound}, error_curves, round_to=1)["a"]
        assert layer.rank == needed
        assert layer.relative_error == pytest.approx(errors[needed], rel=ROOTS64, abs=ROOTS64)


def relative_errors(model: nn.Module, dense: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float(
            (weight - model.get_submodule(name).dense_weight().detach().double()).norm() / weight.norm()
        )
        for name, weight in dense.items()
    }


def weights_of(model: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight.detach().double().clone() for name in names}


@pytest.mark.parametrize(
    ("budget", "bound"),
    [({"error": 0.6}, 0.6), ({"error": 0.85}, 0.85), ({"energy": 0.64}, 0.6), ({"energy": 0.3}, 0.7**0.5)],
    ids=["error-0.6", "error-0.85", "energy-0.64", "energy-0.3"],
)
def test_the_guarantee_holds_on_the_factors(mlp, budget, bound):
    dense = weights_of(mlp, "0", "2")
    compress(mlp, **budget, round_to=1)
    for error in relative_errors(mlp, dense).values():
        assert error <= bound * (1 + 1e-6)


def test_the_guarantee_holds_where_the_randomized_solver_is_chosen():
    # The bound lies just above the optimal error at rank 70, so that nothing is left to be wasted.
    layer = nn.Linear(560, 520)
    layer.weight = nn.Parameter(weight(520, 560, 0))
    model = nn.Sequential(layer)
    dense = weights_of(model, "0")
    bound = error_curve(layer.weight).relative_error(70) * (1 + 1e-6)
    compress(model, error=bound, round_to=1)
    assert relative_errors(model, dense)["0"] <= bound


def test_a_layer_that_would_not_shrink_stays_dense_with_the_reason():
    draft, error_curves = drafted(large=weight(128, 128), small=weight(16, 16))
    chosen = select(draft, {"rank": 12}, error_curves)
    assert chosen["large"].rank == 12
    assert chosen["small"].rank is None
    assert chosen["small"].reason == "rank 12 would not save parameters (the largest that does: 7)"


def test_a_reason_speaks_of_the_rank_that_would_not_save():
    # 25 would save parameters of 64×64 (up to 31 would), 32 would not: the rounding is the reason.
    values = torch.cat([torch.ones(25), torch.full((39,), 1e-3)])
    draft, error_curves = drafted(layer=torch.diag(values), other=weight(128, 128, 3))
    chosen = select(draft, {"error": 0.01}, error_curves, round_to=8)["layer"]
    if chosen.rank is None:
        assert "needs rank 25, which would not save parameters" not in chosen.reason
    else:
        assert 25 <= chosen.rank <= 31


def test_keep_leaves_a_layer_dense_that_is_too_small_or_worth_it():
    draft, error_curves = drafted(tiny=weight(6, 6), flat=weight(64, 64, 0), steep=weight(256, 256, 3))
    chosen = select(draft, {"keep": 0.9}, error_curves, round_to=8)
    assert chosen["tiny"].reason == "too small: no rank saves parameters"
    assert chosen["flat"].reason == "worth its parameters"
    assert chosen["steep"].reason == "chosen by the solver"


def test_the_last_matching_pattern_of_a_mapping_wins():
    layers = {name: weight(64, 64) for name in ("a.query", "a.key", "b.query", "b.key")}
    draft, error_curves = drafted(**layers)
    chosen = select(draft, {"rank": {"*": 4, "*.query": 8, "b.*": 12}}, error_curves)
    assert {layer.name: layer.rank for layer in chosen} == {
        "a.query": 8,
        "a.key": 4,
        "b.query": 12,
        "b.key": 12,
    }


def test_a_layer_that_no_pattern_of_the_mapping_names_stays_dense_with_the_reason():
    draft, error_curves = drafted(a=weight(64, 64), b=weight(64, 64))
    chosen = select(draft, {"rank": {"a": 4}}, error_curves)
    assert (chosen["b"].rank, chosen["b"].reason) == (None, "no pattern of the rank mapping names it")


def test_a_pattern_of_the_mapping_that_matches_nothing_is_refused():
    draft, error_curves = drafted(a=weight(64, 64))
    with pytest.raises(TargetError, match=r'"\*\.query" matches none of the 1 targeted layers'):
        select(draft, {"rank": {"*.query": 4}}, error_curves)


def test_a_mapping_that_names_a_layer_left_alone_says_why_it_is(tiny_bert):
    with pytest.raises(TargetError, match=r"pooler\.dense.*: part of a head \(pooler\)"):
        plan(tiny_bert, rank={"pooler.dense": 4})


@pytest.mark.parametrize("how", ["mapping", "targets"])
def test_a_rank_above_a_named_layer_is_an_error_with_its_range(mlp, how):
    request = {"rank": {"*": 8, "2": 65}} if how == "mapping" else {"rank": 65, "targets": ["2"]}
    message = r"2: rank 65 is above min\(out, in\) = 64 of the weight \(out=64, in=96\).* up to 38"
    with pytest.raises(RankError, match=message):
        plan(mlp, **request)


def test_a_layer_of_zeros_costs_the_allocator_nothing():
    draft, error_curves = drafted(zeros=torch.zeros(64, 64), flat=weight(64, 64, 0))
    chosen = select(draft, {"keep": 0.6}, error_curves, round_to=8)
    assert chosen["zeros"].rank == 8
    assert chosen["zeros"].relative_error == 0


def test_layers_that_are_not_targeted_keep_their_reason_and_do_not_count():
    draft, error_curves = drafted(a=weight(64, 64), head=weight(500, 64))
    head = LayerPlan("head", "linear", 64, 500, True, reason="part of a head (head)", targeted=False)
    draft = draft.with_layers({"head": head})
    chosen = select(draft, {"keep": 0.5}, error_curves)
    assert chosen["head"] == head
    assert chosen["a"].parameters <= 0.5 * 64 * 64


@pytest.mark.parametrize("round_to", [0, -8, 1.5, True, "8"], ids=repr)
def test_a_useless_multiple_is_refused(round_to):
    draft, error_curves = drafted(a=weight(64, 64))
    with pytest.raises(BudgetError, match=r"round_to=.*: give a whole number from 1"):
        select(draft, {"keep": 0.5}, error_curves, round_to=round_to)


def test_an_unknown_allocation_is_refused_with_the_choices():
    draft, error_curves = drafted(a=weight(64, 64))
    with pytest.raises(BudgetError, match="allocation='greedy': give one of 'global', 'uniform'") as caught:
        select(draft, {"keep": 0.5}, error_curves, allocation="greedy")
    assert isinstance(caught.value, LowRankError)

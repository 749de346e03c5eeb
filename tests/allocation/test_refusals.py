"""A budget that cannot be met says which layer, why, and what to do."""

import re

import pytest
import torch
from drafts import drafted, select, weight

from lowrank import compress, plan, quantize
from lowrank.errors import BudgetError


@pytest.mark.parametrize(
    ("budget", "reason", "advice"),
    [
        (
            {"rank": 60},
            "rank 60 would not save parameters (the largest that does: 38)",
            "Use a smaller rank.",
        ),
        (
            {"error": 0.001},
            "error=0.001 needs rank 64, which would not save parameters",
            "Allow a larger error.",
        ),
        (
            {"energy": 0.99999},
            "energy=0.99999 needs rank 64, which would not save parameters",
            "Retain less energy.",
        ),
    ],
    ids=["rank", "error", "energy"],
)
def test_a_budget_that_changes_nothing_names_a_layer_the_reason_and_what_to_do(mlp, budget, reason, advice):
    with pytest.raises(BudgetError, match=re.escape(reason)) as caught:
        plan(mlp, **budget)
    assert "no layer of Sequential would change" in str(caught.value)
    assert "\n  0: " in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "budget",
    [
        {"keep": 0.5},
        {"keep": 0.5, "allocation": "uniform", "round_to": 1, "quantize": "int8"},
        {"rank": 4, "quantize": "int8"},
        {"energy": 0.9},
        {"max_bytes": 10_000, "allocation": "uniform"},
        {"speedup": 1.1, "inputs": torch.randn(2, 64)},
    ],
    ids=["keep", "uniform", "rank", "energy", "max-bytes", "speedup"],
)
@pytest.mark.parametrize("made", [plan, compress], ids=["plan", "compress"])
def test_where_no_layer_is_left_every_budget_is_refused(mlp, made, budget):
    quantize(mlp)
    with pytest.raises(BudgetError, match="no layer of Sequential would change") as caught:
        made(mlp, **budget)
    assert "0: is quantized already (int8); decompress(model) undoes that" in str(caught.value)
    assert "Call decompress(model) first" in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "round_to"),
    [
        ([(64, 96), (96, 64)], 8),
        ([(16, 100)], 2),  # the fraction needed is 0.145 exactly, and 0.145 · 1600 < 232 in floating point
        ([(16, 100)], 4),
        ([(33, 77), (128, 40)], 3),
        ([(12, 12), (200, 200)], 8),
    ],
    ids=["mlp", "exact-thousandth", "exact-hundredth", "odd", "mixed"],
)
def test_the_keep_that_an_error_proposes_is_feasible_and_nearly_the_least(shapes, round_to):
    weights = {f"layer{i}": weight(*shape, seed=i) for i, shape in enumerate(shapes)}
    draft, error_curves = drafted(**weights)
    with pytest.raises(BudgetError, match=r"Use keep=[\d.]+ or more, or a smaller round_to") as caught:
        select(draft, {"keep": 0.001}, error_curves, round_to=round_to)
    proposed = float(re.search(r"Use keep=([\d.]+) or", str(caught.value))[1])
    assert select(draft, {"keep": proposed}, error_curves, round_to=round_to).kept_fraction <= proposed
    with pytest.raises(BudgetError, match="but the smallest ranks"):
        select(draft, {"keep": proposed - 0.0021}, error_curves, round_to=round_to)


def test_keep_on_layers_too_small_to_shrink_does_not_propose_a_keep_that_is_refused():
    draft, error_curves = drafted(layer=weight(10, 10))
    # Rank 8 has 160 parameters, so the least is the dense weight: no keep below 1 is enough.
    with pytest.raises(BudgetError, match=r"multiples of 8\) need 100\. Use a smaller round_to\.$"):
        select(draft, {"keep": 0.5}, error_curves, round_to=8)

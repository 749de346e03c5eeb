"""A plan, strategies that make plans, and plans that are damaged by hand."""

from hypothesis import strategies as st

from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan

LAYERS = (
    LayerPlan("encoder.0.query", "linear", 64, 64, True, 16, 0.25, "as asked"),
    LayerPlan("encoder.0.value", "linear", 64, 64, True, None, None, "worth its parameters"),
    LayerPlan("encoder.1.query", "linear", 64, 128, False, 24, 0.5, "as asked"),
    LayerPlan("pooler.dense", "linear", 64, 64, True, None, None, "part of a head (pooler)", False),
)
PLAN = Plan("BertModel", LAYERS, "rank={'*.query': 16}")

ranks = st.none() | st.integers(1, 10**6)
errors = st.none() | st.floats(0, 1)
layer_plans = st.builds(
    LayerPlan,
    name=st.text(min_size=1, max_size=20),
    layer_type=st.sampled_from(["linear", "conv1d", "MyLinear"]),
    in_features=st.integers(1, 10**6),
    out_features=st.integers(1, 10**6),
    bias=st.booleans(),
    rank=ranks,
    relative_error=errors,
    reason=st.text(max_size=30),
    targeted=st.booleans(),
)
plans = st.builds(
    Plan,
    model=st.text(max_size=20),
    layers=st.lists(layer_plans, max_size=5, unique_by=lambda layer: layer.name).map(tuple),
    budget=st.text(max_size=20),
    metric=st.just("weight"),
    allocation=st.sampled_from(["global", "uniform"]),
    round_to=st.integers(1, 64),
)


def edited(**changes: object) -> dict:
    return {**PLAN.to_dict(), **changes}

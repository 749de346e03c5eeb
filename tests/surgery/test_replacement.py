"""Replacing layers: everything is validated first, and what the user set on a layer stays."""

import copy
import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowrank import LowRankLinear, apply, compress, decompress, plan, quantize
from lowrank.errors import BudgetError, LowRankError, PlanError, RankError, TargetError, WeightError
from lowrank.linalg import choose_solver
from lowrank.nn import layer_type_of
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan
from lowrank.surgery.inheritance import HOOKS as PLACES_OF_HOOKS

LAST = "encoder.layer.1.output.dense"  # the last layer that is swapped; the damage is done here
FIRST = "encoder.layer.0.attention.self.query"


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a refused request must leave as it was: identities, bits, flags and hooks."""
    return {
        "modules": {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
        "parameters": {
            n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
        },
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {(n, h): dict(vars(m)[h] or {}) for n, m in model.named_modules() for h in PLACES_OF_HOOKS},
        "state": {n: t if t.is_meta else t.detach().clone() for n, t in model.state_dict().items()},
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    for part in ("modules", "parameters", "training", "hooks"):
        assert after[part] == before[part]
    assert after["state"].keys() == before["state"].keys()
    for name, tensor in before["state"].items():
        new = after["state"][name]
        assert new.dtype == tensor.dtype
        assert new.is_meta == tensor.is_meta
        if not tensor.is_meta:  # bytes, so that NaN equals NaN
            assert torch.equal(new.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def frobenius_errors(model: nn.Module, dense: dict[str, Tensor]) -> dict[str, float]:
    """Measured apart from the library, in float64."""
    errors = {}
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        product = layer.up.weight.detach().double() @ layer.down.weight.detach().double()
        errors[name] = float((weight - product).norm() / weight.norm())
    return errors


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every weight as ``(out, in)`` in float64, by layer name."""
    kinds = {name: (m, layer_type_of(m)) for name, m in model.named_modules()}
    return {name: kind.weight(m).detach().double().clone() for name, (m, kind) in kinds.items() if kind}


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
    ("request_", "error"),
    [
        ({}, BudgetError),
        ({"rank": 8, "keep": 0.5}, BudgetError),
        ({"keep": 1.0}, BudgetError),
        ({"rank": 0}, RankError),
        ({"rank": 1000}, BudgetError),
        ({"rank": 65, "targets": [FIRST]}, RankError),
        ({"rank": 8, "targets": ["*.nothing"]}, TargetError),
        ({"keep": 0.01}, BudgetError),
        ({"rank": 8, "tolerance": 0}, LowRankError),
        ({"rank": 8, "seed": "one"}, Exception),
    ],
    ids=[
        "no-budget", "two-budgets", "keep-1", "rank-0", "rank-1000", "rank-above-named", "no-target",
        "keep-tiny", "tolerance-0", "seed-text",
    ],
)  # fmt: skip
def test_a_bad_request_leaves_the_model_untouched(tiny_bert, request_, error):
    # One layer is large enough for the randomized solver, and comes last: only there the seed is read.
    model = busy(tiny_bert)
    model.add_module("late", nn.Linear(520, 520))
    assert choose_solver(520, 520, 8) == "randomized"
    before = snapshot(model)
    with pytest.raises(error):
        compress(model, **request_)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"]
)
@pytest.mark.parametrize(
    "budget",
    [{"rank": 12}, {"keep": 0.5}, {"error": 0.7}, {"energy": 0.5}],
    ids=["rank", "keep", "error", "energy"],
)
def test_the_error_in_the_plan_is_the_one_measured_after_applying(tiny_bert, budget, dtype):
    model = tiny_bert.to(dtype)
    weights = dense_weights(model)
    decided = plan(model, **budget)
    apply(model, decided)
    measured = frobenius_errors(model, {layer.name: weights[layer.name] for layer in decided.factorized})
    assert measured
    for name, error in measured.items():
        # Storing two factors adds about a unit of rounding, at right angles to the error itself.
        rounded = (error**2 + torch.finfo(dtype).eps ** 2) ** 0.5 - error + 1e-6
        assert decided[name].relative_error == pytest.approx(error, rel=1e-4, abs=rounded)
        assert model.get_submodule(name).relative_error == pytest.approx(error, rel=1e-4)


def test_the_error_in_the_plan_is_within_the_tolerance_where_the_solver_is_randomized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(560, 520))
    assert choose_solver(520, 560, 60) == "randomized"
    weights, decided = dense_weights(model), plan(model, rank=60)
    error = frobenius_errors(apply(model, decided), weights)["0"]
    predicted = decided["0"].relative_error
    assert predicted * (1 - 1e-6) <= error <= predicted * (1 + 1e-3)
    assert model[0].relative_error == pytest.approx(error, rel=1e-5)


def test_only_the_planned_layers_change(tiny_bert):
    kept = {name: module for name, module in tiny_bert.named_modules() if not name.startswith(FIRST)}
    compress(tiny_bert, rank=8, targets=[FIRST])
    assert isinstance(tiny_bert.get_submodule(FIRST), LowRankLinear)
    now = dict(tiny_bert.named_modules())
    assert all(now[name] is module for name, module in kept.items())


def test_dense_weights_are_freed(tiny_bert):
    names = [layer.name for layer in plan(tiny_bert, rank=8).factorized]
    weights = [weakref.ref(tiny_bert.get_submodule(name).weight) for name in names]
    layers = [weakref.ref(tiny_bert.get_submodule(name)) for name in names]
    compress(tiny_bert, rank=8)
    gc.collect()
    assert len(names) == 12
    assert not any(ref() is not None for ref in [*weights, *layers])


def test_a_dense_weight_is_gone_before_the_next_layer_is_decomposed(mlp, monkeypatch):
    from lowrank.surgery import factorization

    first, alive = weakref.ref(mlp[0].weight), []
    real = factorization.truncated_svd

    def watched(*args: object, **kwargs: object) -> object:
        alive.append(first() is not None)
        return real(*args, **kwargs)

    monkeypatch.setattr(factorization, "truncated_svd", watched)
    compress(mlp, rank=8)
    assert alive == [True, False]


HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(lambda *_: hook()),
    "forward-with-kwargs": lambda layer, hook: layer.register_forward_hook(
        lambda module, args, kwargs, output: hook(), with_kwargs=True
    ),
    "forward-always": lambda layer, hook: layer.register_forward_hook(lambda *_: hook(), always_call=True),
    "pre-forward": lambda layer, hook: layer.register_forward_pre_hook(lambda *_: hook()),
    "pre-forward-with-kwargs": lambda layer, hook: layer.register_forward_pre_hook(
        lambda module, args, kwargs: hook(), with_kwargs=True
    ),
    "backward": lambda layer, hook: layer.register_full_backward_hook(lambda *_: hook()),
    "pre-backward": lambda layer, hook: layer.register_full_backward_pre_hook(lambda *_: hook()),
}

STATE_HOOKS = {
    "save-pre": lambda layer, hook: layer.register_state_dict_pre_hook(lambda *_: hook()),
    "save-post": lambda layer, hook: layer.register_state_dict_post_hook(lambda *_: hook()),
    "load-pre": lambda layer, hook: layer.register_load_state_dict_pre_hook(lambda *_: hook()),
    "load-post": lambda layer, hook: layer.register_load_state_dict_post_hook(lambda *_: hook()),
}


@pytest.mark.parametrize("there_and_back", [False, True], ids=["compressed", "decompressed"])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_stay_and_their_handles_still_remove_them(mlp, register, there_and_back):
    calls = []
    handle = register(mlp[2], lambda: calls.append(1))
    compress(mlp, rank=8)
    if there_and_back:
        decompress(mlp)

    def step() -> int:
        before = len(calls)
        mlp(torch.ones(3, 64, requires_grad=True)).sum().backward()
        return len(calls) - before

    assert step() == 1
    handle.remove()
    assert step() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: compress(model, rank=8),
        lambda model: decompress(compress(model, rank=8)),
        quantize,
        lambda model: decompress(quantize(model)),
        lambda model: compress(model, rank=8, quantize="int8"),
    ],
    ids=["compressed", "decompressed", "quantized", "dequantized", "both"],
)
@pytest.mark.parametrize("register", STATE_HOOKS.values(), ids=STATE_HOOKS)
def test_hooks_on_the_state_dict_stay_and_their_handles_still_remove_them(mlp, register, change):
    calls = []
    handle = register(mlp[2], lambda: calls.append(1))
    change(mlp)
    gc.collect()  # a hook on loading must not ask for the layer that it was registered on
    calls.clear()
    mlp.load_state_dict(mlp.state_dict())
    assert calls == [1]
    handle.remove()
    mlp.load_state_dict(mlp.state_dict())
    assert calls == [1]


def test_a_hook_on_loading_is_called_with_the_layer_that_is_there_now(mlp):
    seen = []
    mlp[2].register_load_state_dict_pre_hook(lambda layer, *_: seen.append(layer))
    compress(mlp, rank=8)
    mlp.load_state_dict(mlp.state_dict())
    assert seen == [mlp[2]]


def test_every_place_where_pytorch_keeps_hooks_is_known():
    assert {"_state_dict_hooks", "_load_state_dict_pre_hooks", "_forward_hooks"} < set(PLACES_OF_HOOKS)


def test_decompress_refuses_hooks_on_factors_which_would_be_lost(mlp):
    compress(mlp, rank=8)
    handle = mlp[2].down.register_forward_hook(lambda *_: None)
    before = snapshot(mlp)
    with pytest.raises(LowRankError, match=r"2\.down: has hooks, .* Remove them first"):
        decompress(mlp)
    assert_untouched(mlp, before)
    handle.remove()
    decompress(mlp)


@pytest.mark.parametrize(
    "compressed",
    [quantize, lambda model: compress(model, rank=8, quantize="int8"), lambda model: compress(model, rank=8)],
    ids=["quantized", "quantized-factors", "factors"],
)
def test_a_frozen_weight_is_frozen_still_when_it_is_dense_again(mlp, compressed):
    model = nn.Sequential(mlp, nn.Embedding(16, 64))
    mlp[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    copy.deepcopy(decompress(compressed(model)))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {
        "0.0.weight": False, "0.0.bias": True, "0.2.weight": True, "0.2.bias": True, "1.weight": False,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["equal", "tied"])
def test_a_frozen_copy_is_frozen_still_when_it_is_dense_again(tied):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[0].weight if tied else nn.Parameter(model[0].weight.detach().clone(), False)
    before = [model[0].weight.requires_grad, model[2].weight.requires_grad]
    decompress(compress(model, rank=4))
    assert [model[0].weight.requires_grad, model[2].weight.requires_grad] == before


def test_a_bias_that_is_added_to_a_frozen_layer_is_frozen():
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).requires_grad_(False)
    data = [torch.randn(40, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    compress(model, rank=4, data=data, loss=None, add_bias=True)
    assert model[0].added_bias
    assert not any(parameter.requires_grad for parameter in model.parameters())


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


def test_frozen_weights_stay_frozen_and_others_trainable(mlp):
    mlp[0].weight.requires_grad_(False)
    mlp[2].bias.requires_grad_(False)
    compress(mlp, rank=8)
    flags = {name: p.requires_grad for name, p in mlp.named_parameters()}
    assert flags == {
        "0.down.weight": False, "0.up.weight": False, "0.up.bias": True,
        "2.down.weight": True, "2.up.weight": True, "2.up.bias": False,
    }  # fmt: skip
    decompress(mlp)
    flags = {name: p.requires_grad for name, p in mlp.named_parameters()}
    assert flags == {"0.weight": False, "0.bias": True, "2.weight": True, "2.bias": False}


def test_training_flags_stay_layer_by_layer(mlp):
    mlp.train()
    mlp[2].eval()
    compress(mlp, rank=8)
    assert [module.training for module in (mlp, mlp[0], mlp[0].up, mlp[2], mlp[2].down)] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_the_bias_is_the_same_parameter_and_none_stays_none():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    bias = model[0].bias
    compress(model, rank=8)
    assert model[0].bias is bias
    assert model[1].bias is None
    decompress(model)
    assert model[0].bias is bias
    assert model[1].bias is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"]
)
def test_decompress_gives_linear_layers_of_the_same_outputs(mlp, dtype):
    mlp = mlp.to(dtype)
    keys, shapes = list(mlp.state_dict()), [p.shape for p in mlp.parameters()]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    compress(mlp, rank=8)
    small = mlp(x)
    assert decompress(mlp) is mlp
    assert [type(module) for module in mlp] == [nn.Linear, nn.GELU, nn.Linear]
    assert list(mlp.state_dict()) == keys
    assert [p.shape for p in mlp.parameters()] == shapes
    assert all(p.dtype == dtype for p in mlp.parameters())
    # Both sum 96 products in another order, and the weight is rounded once more.
    atol = 10 * torch.finfo(dtype).eps * float(small.detach().abs().max())
    torch.testing.assert_close(mlp(x), small, rtol=0, atol=atol)


def test_decompress_gives_conv1d_back_to_gpt2():
    from transformers import GPT2Config, GPT2Model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=2)).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = dense_weights(model)
    compress(model, rank=8)
    errors = frobenius_errors(model, weights)
    assert len(errors) == 4
    assert all(0 < error < 1 for error in errors.values())
    with torch.no_grad():
        small = model(torch.tensor([[1, 2, 3]])).last_hidden_state
        decompress(model)
        again = model(torch.tensor([[1, 2, 3]])).last_hidden_state
    assert all(type(model.get_submodule(name)) is Conv1D for name in errors)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    torch.testing.assert_close(again, small, rtol=0, atol=1e-5 * float(small.abs().max()))


def test_decompress_leaves_a_dense_model_alone(mlp):
    before = snapshot(mlp)
    decompress(mlp)
    assert_untouched(mlp, before)


def test_decompress_refuses_a_model_that_is_a_low_rank_layer_itself():
    layer = LowRankLinear.from_linear(nn.Linear(64, 32), rank=8)
    before = snapshot(layer)
    with pytest.raises(LowRankError, match="is itself a LowRankLinear"):
        decompress(layer)
    assert_untouched(layer, before)


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


def test_the_layers_that_remain_can_be_compressed_in_a_second_call(tiny_bert):
    compress(tiny_bert, rank=8, targets=["*.query"])
    done = {name: m for name, m in tiny_bert.named_modules() if isinstance(m, LowRankLinear)}
    compress(tiny_bert, rank=4, targets=["*.key"])
    ranks = {n: m.rank for n, m in tiny_bert.named_modules() if isinstance(m, LowRankLinear)}
    assert sorted(ranks.values()) == [4, 4, 8, 8]
    assert all(tiny_bert.get_submodule(name) is module for name, module in done.items())


def test_a_plan_can_be_applied_twice_and_the_second_time_changes_nothing(mlp):
    decided = plan(mlp, rank=8)
    apply(mlp, decided)
    before = snapshot(mlp)
    apply(mlp, decided)
    assert_untouched(mlp, before)


def test_a_plan_with_another_rank_for_a_factorized_layer_is_refused_with_advice(mlp):
    decided = plan(mlp, rank=8)
    apply(mlp, decided)
    before = snapshot(mlp)
    message = r"2: factorized already, at rank 8; the plan says 4.*decompress\(model\) first"
    with pytest.raises(PlanError, match=re.compile(message, re.DOTALL)):
        apply(mlp, decided.with_rank("2", 4))
    assert_untouched(mlp, before)


def test_decompress_and_compress_at_a_lower_rank_is_the_best_of_the_product(mlp):
    compress(mlp, rank=16)
    decompress(mlp)
    weight = mlp[0].weight.detach().double()
    values = torch.linalg.svdvals(weight)
    compress(mlp, rank=4, targets=["0"])
    error = frobenius_errors(mlp, {"0": weight})["0"]
    assert error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)


def large_model() -> nn.Sequential:
    """A layer for each solver: the first is randomized at rank 16, the second exact."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(520, 520), nn.Linear(520, 64))


def test_equal_seeds_give_equal_bits():
    model = large_model()
    assert choose_solver(520, 520, 16) == "randomized"
    one, two, other = (compress(copy.deepcopy(model), rank=16, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[0].up.weight, other[0].up.weight)


def test_the_global_random_state_is_neither_read_nor_moved():
    one, two = large_model(), large_model()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    compress(one, rank=16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    compress(two, rank=16)
    assert torch.equal(one[0].up.weight, two[0].up.weight)
    decompress(one)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())


def test_a_hand_edited_plan_is_carried_out_as_edited(tiny_bert):
    decided = Plan.from_json(plan(tiny_bert, rank=8).to_json())
    decided = decided.with_rank("*.query", 3).with_rank("*.key", None).with_rank("pooler.dense", 5)
    apply(tiny_bert, decided)
    ranks = {n: m.rank for n, m in tiny_bert.named_modules() if isinstance(m, LowRankLinear)}
    assert ranks == {layer.name: layer.rank for layer in decided.factorized}
    assert ranks["pooler.dense"] == 5
    assert {rank for name, rank in ranks.items() if name.endswith("query")} == {3}
    assert not [name for name in ranks if name.endswith("key")]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_models_are_compressed_where_they_are(tiny_bert):
    model = tiny_bert.to("cuda")
    weights = {name: weight.cpu() for name, weight in dense_weights(model).items()}
    decided = plan(model, rank=8)
    apply(model, decided)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    for name, error in frobenius_errors(
        model.cpu(), {x.name: weights[x.name] for x in decided.factorized}
    ).items():
        assert decided[name].relative_error == pytest.approx(error, rel=1e-3)

"""`share="layers"`: adjacent blocks of one role share a basis, where that is better."""

import copy
import functools
import gc
import json
import weakref

import pytest
import sharing_models
import torch
from closeness import CANCELLED32, LAYERS32, SUMS32
from sharing_models import changed, hidden, ids
from transformers import (
    AutoModel,
    BertForSequenceClassification,
)

import lowrank
from lowrank import (
    BudgetError,
    LowRankConfig,
    PlanError,
    StatsError,
    apply,
    calibrate,
    compress,
    plan,
    report,
)
from lowrank.linalg import error_curve
from lowrank.nn import LowRankLinear
from lowrank.nn.shared import results
from lowrank.plans.plan import Plan

bert = functools.partial(sharing_models.bert, blocks=4)
llama = functools.partial(sharing_models.llama, blocks=4)
QUERY = "encoder.layer.{}.attention.self.query"


@pytest.fixture(params=[bert, llama], ids=["bert", "llama"])
def model(request):
    return request.param()


def blocks_of(decided: Plan) -> set[tuple[int, ...]]:
    def number(name):
        return int(next(part for part in name.split(".") if part.isdigit()))

    return {tuple(number(layer.name) for layer in layers) for layers in decided.shared.values()}


@pytest.mark.parametrize(
    ("size", "expected"), [(None, {(0, 1), (2, 3)}), (3, {(0, 1, 2)}), (4, {(0, 1, 2, 3)})]
)
def test_one_role_in_adjacent_blocks_shares_at_a_given_rank(model, size, expected):
    decided = plan(model, rank=4, stats=calibrate(model, ids()), share="layers", share_size=size)
    assert blocks_of(decided) == expected
    for layers in decided.shared.values():
        assert len({layer.name.split(".", 3)[-1] for layer in layers}) == 1
        assert [layer.same_input for layer in layers] == [True] + [False] * (len(layers) - 1)
    roles = {layer.name.split(".", 3)[-1] for layer in decided.factorized}
    assert len(decided.shared) == len(roles) * len(expected)


@pytest.mark.parametrize("metric", ["weight", "diagonal", "inputs", "loss"])
def test_the_layers_reach_what_is_planned(model, metric):
    """What alternating gains is interpolated between ranks, so the plan is not exact."""
    stats = calibrate(model, ids())
    small = apply(
        copy.deepcopy(model),
        decided := plan(model, rank=3, stats=stats, metric=metric, share="layers", share_size=4),
        stats,
    )
    for layer in decided.factorized:
        module, dense = small.get_submodule(layer.name), model.get_submodule(layer.name)
        # As much as alternating was seen to gain: what it gains between two ranks is interpolated.
        assert module.relative_error == pytest.approx(layer.relative_error, rel=0.1)
        own = error_curve(dense.weight, stats.metric(layer.name, metric, layer.has_bias)).relative_error(3)
        assert module.relative_error > own - 1e-6
        if metric in ("weight", "inputs"):
            side = stats.metric(layer.name, metric, layer.has_bias).inputs
            lost = side.times_root((dense.weight - module.dense_weight()).detach().double()).norm()
            norm = side.times_root(dense.weight.detach().double()).norm()
            assert float(lost / norm) == pytest.approx(module.relative_error, rel=CANCELLED32)


def test_without_data_the_weights_are_stacked(tmp_path):
    model = bert()
    small = compress(copy.deepcopy(model), rank=4, share="layers", share_size=2)
    pair = [model.get_submodule(QUERY.format(i)).weight.detach() for i in (0, 1)]
    norms = [weight.norm() for weight in pair]  # a relative error counts the same in both
    u, s, v = torch.linalg.svd(torch.cat([weight / norm for weight, norm in zip(pair, norms, strict=True)]))
    best = (u[:, :4] * s[:4] @ v[:4]).split(32)
    for i in (0, 1):
        found = small.get_submodule(QUERY.format(i)).dense_weight()
        torch.testing.assert_close(found, best[i] * norms[i], rtol=LAYERS32, atol=SUMS32)
    model.save_pretrained(tmp_path)
    asked = LowRankConfig(rank=4, share="layers", share_size=2)
    torch.testing.assert_close(
        hidden(AutoModel.from_pretrained(tmp_path, quantization_config=asked)), hidden(small)
    )


def test_blocks_with_much_in_common_share_and_others_do_not():
    for alike, keep in ((0.95, 0.5), (0.0, 0.9)):
        model = bert(alike=alike)
        stats = calibrate(model, ids())
        alone, decided = (
            plan(model, keep=keep, stats=stats, round_to=1, share=share) for share in (None, "layers")
        )
        assert bool(decided.shared) == (alike > 0)
        assert decided.loss_increase <= alone.loss_increase * (1 + 1e-9)
        assert decided.kept_fraction <= keep


def test_the_allocator_takes_pairs_or_fours():
    model = bert(blocks=8, alike=0.0)
    queries = [block.attention.self.query.weight for block in model.encoder.layer]
    for first, others in ((0, (1, 2, 3)), (4, (5,)), (6, (7,))):
        for other in others:
            nearly = queries[first].data  # wholly equal ones would be one layer
            queries[other].data = nearly + 1e-4 * torch.randn_like(nearly)
    stats = calibrate(model, ids())
    decided = plan(
        model, keep=0.4, stats=stats, metric="inputs", round_to=1, share="layers", targets=["*.query"]
    )
    assert blocks_of(decided) == {(0, 1, 2, 3), (4, 5), (6, 7)}


@pytest.mark.parametrize(
    "budget", [{"keep": 0.4}, {"keep": 0.3, "allocation": "uniform"}, {"max_bytes": 90_000}]
)
def test_a_budget_holds(budget):
    model = bert(alike=0.9)
    stats = calibrate(model, ids())
    decided = plan(model, stats=stats, round_to=1, share="layers", **budget)
    small = apply(copy.deepcopy(model), decided, stats)
    parameters = sum(p.numel() for p in small.parameters())
    assert decided.shared and parameters == report(small).parameters
    if "keep" in budget:
        assert decided.kept_fraction <= budget["keep"]
    else:
        assert 4 * parameters <= budget["max_bytes"]


@pytest.mark.parametrize("budget", [{"error": 0.5}, {"energy": 0.8}])
def test_a_bound_on_errors_holds_for_every_layer_that_shares(budget):
    model = bert(alike=0.9)
    stats = calibrate(model, ids())
    decided = plan(model, stats=stats, metric="inputs", round_to=1, share="layers", **budget)
    small = apply(copy.deepcopy(model), decided, stats)
    bound = budget.get("error") or (1 - budget["energy"]) ** 0.5
    assert decided.shared
    assert all(small.get_submodule(layer.name).relative_error <= bound for layer in decided.factorized)


def test_transformers_folders_load_bit_for_bit(model, tmp_path):
    small = compress(copy.deepcopy(model), rank=4, data=ids(), share="layers", share_size=3)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(hidden(loaded), hidden(small))
    first, second = report(small), report(loaded)
    assert first.parameters == second.parameters == sum(p.numel() for p in loaded.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size == second.checkpoint_bytes
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["plan"]["layers"]
    assert {layer["same_input"] for layer in layers if layer["shares_down_with"]} == {False}
    assert all(
        layer.down.readers == 1
        for layer in loaded.modules()
        if isinstance(layer, LowRankLinear) and not layer.owns_down
    )
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(hidden(type(model).from_pretrained(tmp_path / "again")), hidden(small))


def test_a_base_checkpoint_loads_into_a_model_with_a_head_and_back(tmp_path):
    small = compress(bert(), rank=4, data=ids(), share="layers")
    small.save_pretrained(tmp_path)
    head = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(hidden(head.bert), hidden(small))
    head.save_pretrained(tmp_path / "head")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "head")), hidden(small))


def test_generic_checkpoints_load_bit_for_bit(tmp_path):
    model = bert()
    small = compress(copy.deepcopy(model), rank=4, data=ids(), share="layers")
    lowrank.save(torch.nn.ModuleDict({"inner": small}), tmp_path / "there")
    loaded = lowrank.load(tmp_path / "there", torch.nn.ModuleDict({"inner": model}))
    assert torch.equal(hidden(loaded["inner"]), hidden(small))


def test_training_copying_and_decompressing_go_on(model):
    small = compress(model, rank=4, data=ids(), share="layers")
    twin, before = copy.deepcopy(small), hidden(small)
    small(**ids(1)[0])[0].square().mean().backward()
    downs = [p for n, p in small.named_parameters() if "down" in n]
    assert all(p.grad is not None for p in downs)
    torch.optim.AdamW(small.parameters(), lr=1e-2).step()
    after = hidden(small)
    assert not torch.equal(after, before) and torch.equal(hidden(twin), before)
    with torch.no_grad():
        compiled = torch.compile(small, backend="aot_eager")
        torch.testing.assert_close(compiled(**ids(1, seed=9)[0])[0], after, rtol=LAYERS32, atol=SUMS32)
    torch.testing.assert_close(hidden(lowrank.decompress(small)), after, rtol=LAYERS32, atol=SUMS32)


def test_gradients_of_a_shared_basis_are_the_sum_over_its_layers():
    small = compress(bert(), rank=4, data=ids(), share="layers", targets=["*.query"])
    separately_saved = copy.deepcopy(small)
    user, owner = (
        separately_saved.get_submodule(QUERY.format(1)),
        separately_saved.get_submodule(QUERY.format(0)),
    )
    own = torch.nn.Linear(32, 4, bias=False)
    own.weight.data = owner.down.weight.data.clone()
    user._modules["down"] = own
    for each in (small, separately_saved):
        each(**ids(1)[0])[0].square().sum().backward()
    both = owner.down.weight.grad + own.weight.grad
    torch.testing.assert_close(small.get_submodule(QUERY.format(0)).down.weight.grad, both)


def test_no_result_is_kept_after_a_forward_pass():
    small = compress(bert(), rank=4, data=ids(), share="layers")
    seen = []
    owner = small.get_submodule(QUERY.format(0))
    handle = owner.down.register_forward_hook(lambda m, i, output: seen.append(weakref.ref(output)))
    hidden(small)
    handle.remove()
    gc.collect()
    assert len(seen) == 2 and all(each() is None for each in seen)
    assert owner.down not in results.by_module


def test_a_plan_can_be_edited_by_hand():
    model = bert()
    stats = calibrate(model, ids())
    decided = plan(model, rank=4, stats=stats, share="layers", share_size=3)
    edited = decided.with_rank(QUERY.format(0), 6)
    assert (
        edited[QUERY.format(2)].shares_down_with == QUERY.format(1) and not edited[QUERY.format(2)].same_input
    )
    assert edited[QUERY.format(1)].shares_down_with is None and edited[QUERY.format(1)].same_input
    assert Plan.from_json(edited.to_json()) == edited
    small = apply(copy.deepcopy(model), edited, stats)
    assert report(small).parameters == sum(p.numel() for p in small.parameters())
    assert torch.equal(hidden(apply(small, edited, stats)), hidden(small))


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("encoder.layer.0.output.dense", {}, PlanError, "64 inputs where that has rank 4 and 32"),
        (QUERY.format(2), {"rank": 5}, PlanError, "has rank 5 and 32 inputs where that has rank 4"),
        (QUERY.format(1), {"same_input": True}, StatsError, "do not read the same input"),
    ],
    ids=["unlike-shape", "unlike-rank", "unlike-input"],
)
def test_layers_that_cannot_share_change_nothing(name, fields, error, message):
    model = bert()
    stats = calibrate(model, ids())
    decided = plan(model, rank=4, stats=stats)
    decided = changed(decided, name, **{"shares_down_with": QUERY.format(0), "same_input": False, **fields})
    before = hidden(model)
    with pytest.raises(error, match=message):
        apply(model, decided, stats)
    assert torch.equal(hidden(model), before)


def test_a_basis_for_some_that_read_the_same_input_and_some_that_do_not_is_refused():
    model = bert()
    stats = calibrate(model, ids())
    decided = plan(model, rank=4, stats=stats)
    decided = changed(decided, QUERY.format(1), shares_down_with=QUERY.format(0), same_input=False)
    decided = changed(decided, "encoder.layer.0.attention.self.key", shares_down_with=QUERY.format(0))
    with pytest.raises(PlanError, match="only some of the layers that use its down read the same input"):
        apply(model, decided, stats)


def test_block_by_block_a_basis_of_several_blocks_is_refused_before_anything_changes():
    model = bert()
    before = hidden(model)
    with pytest.raises(PlanError, match="which is in another block"):
        compress(model, rank=4, data=ids(), share="layers", sequential=True)
    assert torch.equal(hidden(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "inputs", "share_size": 2}, 'it goes with share="layers"'),
        ({"share": "layers", "share_size": 1}, "share_size=1: give a whole number from 2"),
        ({"share": "layers", "share_size": True}, "share_size=True: give a whole number"),
        ({"share": "layers", "share_size": 50}, "share_size=50: BertModel has 4 repeated blocks"),
        ({"share": "layers", "targets": ["encoder.layer.2.*"]}, "no two adjacent ones have targeted layers"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        plan(bert(), rank=4, **options)


def test_a_model_without_blocks_is_refused_and_speedup_too():
    with pytest.raises(BudgetError, match="of the 0 repeated blocks in ModuleDict"):
        plan(torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64)}), rank=4, share="layers")
    with pytest.raises(BudgetError, match='share="layers" has no latencies'):
        plan(bert(), speedup=1.2, inputs=ids(1)[0], share="layers")


def stack(*widths):
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(32, m), torch.nn.Linear(m, 32)) for m in widths]
    return torch.nn.Sequential(*blocks)


def test_the_report_counts_every_product_and_the_basis_once():
    from torch.utils.flop_counter import FlopCounterMode

    small = compress(stack(48, 48, 48), rank=4, share="layers", share_size=3)
    with FlopCounterMode(display=False) as counter:
        small(torch.zeros(1, 32))
    counted = report(small)
    assert sum(layer.macs for layer in counted.layers) == counter.get_total_flops() // 2
    assert (
        sum(m.macs for m in small.modules() if isinstance(m, LowRankLinear)) == counter.get_total_flops() // 2
    )
    assert counted.parameters == sum(p.numel() for p in small.parameters())
    assert "MACs per token" in str(counted) and "as many MACs" not in str(counted)


def test_blocks_of_unlike_shape_do_not_share():
    """The third of four residual blocks is wider: only the first two are adjacent and alike."""
    decided = plan(stack(48, 48, 64, 48), rank=4, share="layers", share_size=4)
    assert [[layer.name for layer in layers] for layers in decided.shared.values()] == [
        ["0.0", "1.0"],
        ["0.1", "1.1"],
    ]

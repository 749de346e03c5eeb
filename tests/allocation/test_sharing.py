"""`share="inputs"`: layers that read the same input share a factor, where that is better."""

import copy
import json

import pytest
import torch
from closeness import LAYERS32, ROOTS64, SUMS32, agreement
from sharing_models import bert, changed, hidden, ids, llama
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertModel,
)

import lowrank
from lowrank import BudgetError, LowRankError, PlanError, StatsError, apply, calibrate, compress, plan, report
from lowrank.nn import LowRankLinear
from lowrank.plans.plan import Plan


@pytest.fixture(params=[bert, llama], ids=["bert", "llama"])
def model(request):
    return request.param()


def shared_names(decided: Plan) -> list[list[str]]:
    return [[layer.name.split(".")[-1] for layer in layers] for layers in decided.shared.values()]


def test_what_reads_the_same_input_is_found_without_names(model):
    decided = plan(model, rank=4, stats=calibrate(model, ids()), share="inputs")
    found = {tuple(names) for names in shared_names(decided)}
    if isinstance(model, BertModel):
        assert found == {("query", "key", "value")}
    else:
        assert found == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}


@pytest.mark.parametrize("metric", ["weight", "diagonal", "inputs", "loss"])
def test_the_planned_error_is_that_of_the_factors(model, metric):
    stats = calibrate(model, ids())
    decided = plan(model, rank=4, stats=stats, metric=metric, share="inputs")
    small = apply(copy.deepcopy(model), decided, stats)
    assert len(decided.shared) > 1
    for layer in decided.factorized:
        module, dense = small.get_submodule(layer.name), model.get_submodule(layer.name)
        assert module.relative_error == pytest.approx(layer.relative_error, rel=ROOTS64)
        if metric in ("weight", "inputs"):
            lost = (dense.weight - module.dense_weight()).detach().double()
            side = stats.metric(layer.name, metric, layer.has_bias).inputs
            error = side.times_root(lost).norm() / side.times_root(dense.weight.detach().double()).norm()
            assert float(error) == pytest.approx(layer.relative_error, rel=LAYERS32)


@pytest.mark.parametrize(
    "budget", [{"keep": 0.35}, {"keep": 0.3, "allocation": "uniform"}, {"max_bytes": 60_000}]
)
def test_a_budget_over_groups_holds_and_promises_no_more_loss(budget):
    model = bert()
    stats = calibrate(model, ids())
    alone, shared = (
        plan(model, stats=stats, round_to=1, share=share, **budget) for share in (None, "inputs")
    )
    small = apply(copy.deepcopy(model), shared, stats)
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters == report(small).parameters
    assert shared.kept_fraction == pytest.approx(
        sum(row.parameters for row in report(small).layers if "pooler" not in row.name)
        / sum(row.parameters_before for row in report(small).layers if "pooler" not in row.name)
    )
    if "keep" in budget:
        assert shared.kept_fraction <= budget["keep"]
    else:
        assert 4 * parameters <= budget["max_bytes"]
    if "allocation" not in budget:
        assert shared.shared and shared.loss_increase <= alone.loss_increase


def test_sharing_is_left_alone_where_it_does_not_pay():
    """Weights without anything in common lose by sharing when much is kept."""
    model = bert()
    decided = plan(model, keep=0.9, stats=calibrate(model, ids()), round_to=1, share="inputs")
    assert len(decided.shared) < 2


@pytest.mark.parametrize("budget", [{"error": 0.5}, {"energy": 0.8}])
def test_a_bound_on_errors_holds_for_every_layer_that_shares(budget):
    model = bert()
    for layer in model.encoder.layer:  # with much in common
        attention = layer.attention.self
        attention.key.weight.data = attention.query.weight.data + 0.01 * attention.key.weight.data
    stats = calibrate(model, ids())
    decided = plan(model, stats=stats, metric="weight", round_to=1, share="inputs", **budget)
    assert decided.shared
    bound = budget.get("error") or (1 - budget["energy"]) ** 0.5
    assert all(layer.relative_error <= bound for layer in decided.factorized)
    alone = plan(model, stats=stats, metric="weight", round_to=1, **budget)
    assert decided.kept_fraction < alone.kept_fraction


def test_transformers_folders_load_bit_for_bit(model, tmp_path):
    small = compress(copy.deepcopy(model), rank=4, data=ids(), share="inputs")
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(hidden(loaded), hidden(small))
    first, second = report(small), report(loaded)
    assert first.parameters == second.parameters == sum(p.numel() for p in loaded.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size == second.checkpoint_bytes
    config = json.loads((tmp_path / "config.json").read_text())
    assert any(layer["shares_down_with"] for layer in config["quantization_config"]["plan"]["layers"])
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(hidden(type(model).from_pretrained(tmp_path / "again")), hidden(small))


def test_a_base_checkpoint_loads_into_a_model_with_a_head(tmp_path):
    small = compress(bert(), rank=4, data=ids(), share="inputs")
    small.save_pretrained(tmp_path)
    head = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(hidden(head.bert), hidden(small))
    head.save_pretrained(tmp_path / "head")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "head")), hidden(small))


def test_generic_checkpoints_load_bit_for_bit(tmp_path):
    model = torch.nn.ModuleDict({"inner": bert()})
    stats = calibrate(model["inner"], ids())
    small = torch.nn.ModuleDict(
        {"inner": compress(copy.deepcopy(model["inner"]), rank=4, stats=stats, share="inputs")}
    )
    lowrank.save(small, tmp_path / "there")
    loaded = lowrank.load(tmp_path / "there", model)
    assert torch.equal(hidden(loaded["inner"]), hidden(small["inner"]))
    layers = [m for m in loaded.modules() if isinstance(m, LowRankLinear)]
    assert sum(not layer.owns_down for layer in layers) == 4


def test_training_and_decompressing_go_on(model):
    small = compress(model, rank=4, data=ids(), share="inputs")
    before = hidden(small)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    small(**ids(1)[0])[0].square().mean().backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if "down" in n)
    optimizer.step()
    after = hidden(small)
    assert not torch.equal(after, before)
    torch.testing.assert_close(hidden(lowrank.decompress(small)), after, rtol=LAYERS32, atol=SUMS32)


def test_a_plan_can_be_edited_by_hand(model):
    stats = calibrate(model, ids())
    decided = plan(model, rank=4, stats=stats, share="inputs")
    owner, *users = next(iter(decided.shared.values()))
    edited = decided.with_rank(owner.name, 6)
    assert edited[owner.name].rank == 6
    assert {edited[user.name].shares_down_with for user in users} in ({None}, {None, users[0].name})
    assert Plan.from_json(edited.to_json()) == edited
    assert any("down of" in str(change) for change in decided.diff(edited))
    small = apply(copy.deepcopy(model), edited, stats)
    assert report(small).parameters == sum(p.numel() for p in small.parameters())
    assert hidden(small).isfinite().all()
    apply(copy.deepcopy(model), decided.with_rank(users[-1].name, None), stats)
    alone = decided
    for user in users:
        alone = alone.with_rank(user.name, None)
    assert alone[owner.name].shares_down_with is None and owner.name not in alone.shared
    same = decided.with_rank(owner.name, owner.rank)  # by hand, even to the same rank: a factor of its own
    assert owner.name not in same.shared
    assert all(same[user.name].relative_error is None for user in users)


def test_added_biases_stay_with_shared_factors():
    """The bound on the error is one of the centred metric, which needs them."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data = layer.self_attn.q_proj.weight.data[:16].clone()
    stats = calibrate(model, ids())
    decided = plan(model, error=0.6, stats=stats, metric="inputs", round_to=1, add_bias=True, share="inputs")
    assert decided.shared and all(layer.added_bias for layer in decided.factorized)
    small = apply(copy.deepcopy(model), decided, stats)
    for layer in decided.factorized:
        module, dense = small.get_submodule(layer.name), model.get_submodule(layer.name)
        side = stats.metric(layer.name, "inputs", centred=True).inputs
        lost = side.times_root((dense.weight - module.dense_weight()).detach().double()).norm()
        assert float(lost / side.times_root(dense.weight.detach().double()).norm()) <= 0.6
    assert decided.with_rank("*", 3).factorized[0].added_bias


def test_a_weight_of_zeros_can_share():
    model = bert()
    model.encoder.layer[0].attention.self.key.weight.data.zero_()
    stats = calibrate(model, ids())
    for metric in ("inputs", "loss"):
        decided = plan(model, keep=0.4, stats=stats, metric=metric, round_to=1, share="inputs")
        assert hidden(apply(copy.deepcopy(model), decided, stats)).isfinite().all()


def test_applying_again_changes_nothing(model):
    stats = calibrate(model, ids())
    decided = plan(model, rank=4, stats=stats, share="inputs")
    small = apply(model, decided, stats)
    before = hidden(small)
    assert torch.equal(hidden(apply(small, decided, stats)), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 5}, "has rank 5 and 32 inputs where that has rank 4"),
        ({"shares_down_with": "nowhere"}, "nowhere, which has none of its own"),
        ({"shares_down_with": "encoder.layer.0.output.dense"}, "32 inputs where that has rank 4 and 64"),
    ],
)
def test_a_plan_that_shares_what_cannot_be_shared_changes_nothing(fields, message):
    model = bert()
    stats = calibrate(model, ids())
    decided = plan(model, rank=4, stats=stats, share="inputs")
    before = hidden(model)
    with pytest.raises(PlanError, match=message):
        apply(model, changed(decided, "encoder.layer.0.attention.self.key", **fields), stats)
    assert torch.equal(hidden(model), before)


def test_layers_that_do_not_read_the_same_input_cannot_share():
    model = bert()
    stats = calibrate(model, ids())
    other = "encoder.layer.1.attention.self.query"
    decided = changed(
        plan(model, rank=4, stats=stats), "encoder.layer.0.intermediate.dense", shares_down_with=other
    )
    with pytest.raises(StatsError, match="do not read the same input"):
        apply(model, decided, stats)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_bad_requests_are_refused():
    model = bert()
    stats = calibrate(model, ids())
    with pytest.raises(LowRankError, match=r'share="inputs" finds .* by calibration'):
        plan(model, rank=4, share="inputs")
    with pytest.raises(LowRankError, match=r"share='outputs': give one of 'inputs', 'layers'"):
        plan(model, rank=4, stats=stats, share="outputs")
    with pytest.raises(BudgetError, match="another budget than speedup"):
        plan(model, speedup=1.2, inputs=ids(1)[0], stats=stats, share="inputs")
    with pytest.raises(PlanError, match="shared factors, which needs statistics"):
        apply(model, plan(model, rank=4, stats=stats, metric="weight", share="inputs"))


def test_partitions_compete_by_their_hulls():
    """Where two layers are nearly equal and the third is not, those two share and the third does not."""
    model = bert()
    attention = model.encoder.layer[0].attention.self
    query = attention.query.weight.data
    attention.key.weight.data = query + 1e-4 * torch.randn_like(query)  # wholly equal ones become one layer
    decided = plan(
        model, keep=0.5, stats=calibrate(model, ids()), metric="inputs", round_to=1, share="inputs"
    )
    assert ["query", "key"] in shared_names(decided)


def test_a_model_that_shares_in_part_can_be_compressed_further():
    model, data = bert(), ids()
    compress(model, rank=4, data=data, share="inputs", targets=["encoder.layer.0.*"])
    first = report(model).parameters
    compress(copy.deepcopy(model), rank=4, ignore=["encoder.layer.0.*"])  # without data
    compress(model, rank=4, data=data, ignore=["encoder.layer.0.*"])
    assert report(model).parameters < first
    with pytest.raises(BudgetError, match="is factorized already"):
        compress(model, rank=4, data=data)


def test_lora_on_a_shared_factor_reaches_every_layer_and_merges():
    peft = pytest.importorskip("peft")
    small = compress(bert(), rank=4, data=ids(), share="inputs")
    adapted = peft.get_peft_model(
        small, peft.LoraConfig(target_modules=["down", "up"], init_lora_weights=False)
    )
    adapted.eval()
    before = hidden(adapted)
    torch.testing.assert_close(hidden(adapted.merge_and_unload()), before, rtol=LAYERS32, atol=SUMS32)


def test_symbolic_tracing_sees_plain_products():
    from lowrank.nn.shared import SharedDown

    down = SharedDown(8, 4, bias=False)
    down.readers = 2
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(8, 8), down))
    x = torch.randn(3, 8)
    assert traced(x).shape == (3, 4)

    class Reading(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = down

        def forward(self, x):
            return SharedDown.forward(self.down, x)

    assert torch.equal(torch.fx.symbolic_trace(Reading())(x), down(x))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("share", ["inputs", "layers"])
def test_a_shared_factor_is_coded_once_for_all_who_use_it(tiny_bert, scheme, share, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(8)]
    stats = lowrank.calibrate(tiny_bert, data)
    group = 16 if scheme == "int4" else None
    how = {"group_size": group, "ignore": ["embeddings.*"], "on_missing_kernel": "allow"}
    floating = compress(copy.deepcopy(tiny_bert), rank=16, share=share, stats=stats)
    small = lowrank.quantize(copy.deepcopy(floating), scheme, stats=stats, **how)
    at_once = compress(tiny_bert, rank=16, share=share, stats=stats, quantize=scheme, **how)
    with torch.no_grad():
        expected, found, other = (m(**data[0]).last_hidden_state for m in (floating, small, at_once))
    assert torch.equal(found, other)
    least = 0.999 if scheme == "int8" else 0.9
    assert agreement(found, expected) > least
    owners = {
        plan.shares_down_with
        for plan in lowrank.hf.models.recorded(small)
        if plan.shares_down_with is not None
    }
    assert owners
    for owner in owners:
        assert isinstance(small.get_submodule(owner).down, lowrank.nn.SharedQuantizedDown)
    folder = lowrank.save(small, tmp_path / "small")
    assert (folder / "model.safetensors").stat().st_size == lowrank.report(small).checkpoint_bytes
    again = type(small).from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**data[0]).last_hidden_state, found)
    expected_readers, readers = (
        [module.readers for module in model.modules() if isinstance(module, lowrank.nn.SharedQuantizedDown)]
        for model in (at_once, again)
    )
    assert readers == expected_readers
    assert (max(readers) > 1) == (share == "inputs")


def test_coded_shared_factors_are_computed_once_per_forward_pass(tiny_bert, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 24), generator=generator)} for _ in range(4)]
    stats = lowrank.calibrate(tiny_bert, data)
    small = compress(tiny_bert, rank=16, share="inputs", stats=stats, quantize="int8")
    calls = []
    original = lowrank.QuantizedLinear.forward

    def counted(self, input):
        calls.append(self)
        return original(self, input)

    monkeypatch.setattr(lowrank.QuantizedLinear, "forward", counted)
    with torch.no_grad():
        small(**data[0])
    shared = [module for module in small.modules() if isinstance(module, lowrank.nn.SharedQuantizedDown)]
    used = [module for module in shared if module.readers > 1]
    assert used
    assert all(sum(call is module for call in calls) == 1 for module in used)

"""Linear layers with one weight, or with equal ones: one copy, from a model to a checkpoint and back."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import lowrank
from lowrank import LowRankLinear, Plan, QuantizedLinear, compress, quantize, report
from lowrank.errors import LowRankError, PlanError, TargetError
from lowrank.inspection.inspection import Inspection
from lowrank.nn import TiedLinear

SIZE = 64
IDS = torch.arange(96).reshape(4, 24) % 99
HOW = ("factors", "int8", "int4", "factors+int8", "correction")
every_way = pytest.mark.parametrize("how", HOW)
both_ties = pytest.mark.parametrize("tie", ["tied", "copied"])


class Net(nn.Module):
    """``a`` and ``c`` have one weight, or equal ones; ``c`` reads something else than ``a``."""

    def __init__(self, tie: str = "", bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(SIZE, SIZE, bias) for _ in range(3))
        make_equal(self.a, self.c, tie)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def make_equal(owner: nn.Module, other: nn.Module, tie: str) -> None:
    if tie == "tied":
        other.weight = owner.weight
    elif tie == "copied":
        other.weight = nn.Parameter(owner.weight.detach().clone())


def net(tie: str, bias: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(tie, bias).eval()


def batches(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, SIZE, generator=generator) + 1 for _ in range(count)]


def made_small(model: nn.Module, how: str, **options) -> nn.Module:
    if how == "correction":
        return compress(model, rank=8, quantize="int4", correction=True, on_missing_kernel="allow", **options)
    if how.startswith("factors"):
        return compress(model, rank=16, quantize=how.partition("+")[2] or None, **options)
    return quantize(model, how, on_missing_kernel="allow", **options)


def are_one(model: nn.Module, owner: str, other: str) -> bool:
    found = model.get_submodule(other)
    return isinstance(found, TiedLinear) and found.owner is model.get_submodule(owner)


# What becomes one


@both_ties
def test_the_first_is_the_owner_and_the_others_are_aliases_in_the_plan(tie):
    plan = lowrank.plan(net(tie), rank=16)
    assert (plan["a"].rank, plan["a"].tied_to, plan["a"].targeted) == (16, None, True)
    assert (plan["c"].rank, plan["c"].tied_to, plan["c"].targeted) == (16, "a", False)
    assert (plan["c"].parameters, plan["c"].was_copy) == (0, tie == "copied")
    assert plan["c"].reason == "uses the weight of a"
    assert [layer.name for layer in plan.factorized] == ["a", "b"]
    assert Plan.from_json(plan.to_json()) == plan


@both_ties
def test_layers_that_are_not_both_targets_stay_two(tie):
    for options in ({"ignore": ["c"]}, {"targets": ["[ab]"]}):
        plan = lowrank.plan(net(tie), rank=16, **options)
        assert plan["c"].tied_to is None
        assert plan["a"].rank == (16 if tie == "copied" else None)
    with pytest.raises(TargetError, match=r"a: this layer cannot be factorized: it shares its weight with c"):
        lowrank.plan(net("tied"), rank=16, targets=["a"])


def test_what_has_only_the_same_sample_or_constant_is_not_equal():
    model = net("copied")
    with torch.no_grad():
        model.c.weight[1, 1] += 1e-3
    assert Inspection(model).equal_layers(["a", "b", "c"]) == []
    for layer in (model.a, model.b):
        nn.init.zeros_(layer.weight)
    assert Inspection(model).equal_layers(["a", "b", "c"]) == []
    assert Inspection(net("copied").to("meta")).equal_layers(["a", "b", "c"]) == []
    assert Inspection(net("copied")).equal_layers(["a", "b", "c"]) == [["a", "c"]]


def test_a_bias_that_both_share_or_a_tied_table_keeps_them_apart():
    model = net("tied")
    model.c.bias = model.a.bias
    assert lowrank.plan(model, rank=16)["a"].reason == "shares its weight with c.weight (tied)"
    model = nn.ModuleDict({"embedding": nn.Embedding(SIZE, SIZE), **dict(net("tied").named_children())})
    model["embedding"].weight = model["a"].weight
    plan = lowrank.plan(model, rank=16)
    assert (plan["a"].rank, plan["c"].rank, plan["b"].rank) == (None, None, 16)


def test_models_that_are_saved_on_their_own_keep_their_weights():
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    one = transformers.BertModel(config)
    two = nn.ModuleList([one, transformers.BertModel(copy.deepcopy(config))])
    two[1].load_state_dict(one.state_dict())
    assert not lowrank.plan(two, rank=8).equal
    quantize(two)
    assert not any(isinstance(module, TiedLinear) for module in two.modules())


# A weight that stays dense


@both_ties
def test_where_the_owner_stays_dense_nothing_changes_for_the_others(tie):
    model = net(tie)
    plan = lowrank.plan(model, rank={"a": 40, "b": 16}, targets=["*"])  # 40 does not pay
    assert (plan["a"].rank, plan["c"].rank) == (None, None)
    if tie == "copied":
        assert (plan["c"].tied_to, plan["c"].reason) == (None, plan["a"].reason)
        assert plan["c"].parameters == SIZE * SIZE
    before = model.a.weight, model.c.weight
    lowrank.apply(model, plan)
    assert model.a.weight is before[0]
    assert model.c.weight is before[1]
    edited = lowrank.plan(net(tie), rank=16).with_rank("a", None)
    model = lowrank.apply(net(tie), edited)
    assert type(model.c) is nn.Linear
    assert (model.c.weight is model.a.weight) == (tie == "tied")


# One copy


@both_ties
@every_way
def test_any_module_is_saved_and_loaded_bit_for_bit_with_one_copy(how, tie, tmp_path):
    small = made_small(net(tie), how)
    assert are_one(small, "a", "c")
    x = batches(1)[0]
    expected = small(x)
    folder = lowrank.save(small, tmp_path / "small")
    loaded = lowrank.load(folder, model=Net())
    assert are_one(loaded, "a", "c")
    assert torch.equal(loaded.eval()(x), expected)
    told = report(small)
    assert (folder / "model.safetensors").stat().st_size == told.checkpoint_bytes
    alone = report(made_small(net(""), how))
    assert told.parameters < alone.parameters
    assert {row.name: row.bytes for row in told.layers}["c"] == 0
    assert told.parameters_before == sum(p.numel() for p in net(tie).parameters())


@both_ties
@every_way
def test_the_outputs_are_those_of_the_dense_form(how, tie):
    small = made_small(net(tie), how)
    x = batches(1)[0]
    expected = small(x)
    twin = copy.deepcopy(small)
    assert are_one(twin, "a", "c")
    assert twin.a is not small.a
    assert torch.equal(twin(x), expected)
    dense = lowrank.decompress(small)
    assert type(dense.c) is nn.Linear
    assert (dense.c.weight is dense.a.weight) == (tie == "tied")
    assert torch.equal(dense.c.weight, dense.a.weight)
    assert (dense(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("how", ["factors", "int8"])
@both_ties
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_transformers_checkpoint_is_bit_identical_with_one_copy(family, tie, how, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99))
        owner, other = (f"encoder.layer.{number}.intermediate.dense" for number in (0, 1))
    elif family == "llama":
        config = transformers.LlamaConfig(**sizes, vocab_size=99, num_key_value_heads=2, pad_token_id=95)
        model = transformers.LlamaForCausalLM(config)
        owner, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"
    else:
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
        model = transformers.GPT2LMHeadModel(config)
        owner, other = (f"transformer.h.{number}.mlp.c_fc" for number in (0, 1))
    make_equal(model.get_submodule(owner), model.get_submodule(other), tie)
    small = made_small(model.eval(), how)
    assert are_one(small, owner, other)
    with torch.no_grad():
        expected = small(IDS)[0]
    small.save_pretrained(tmp_path / "one")
    loaded = type(small).from_pretrained(tmp_path / "one").eval()
    loaded.save_pretrained(tmp_path / "two")
    lowrank.save(small, tmp_path / "three")
    for again in (loaded, type(small).from_pretrained(tmp_path / "two"), lowrank.load(tmp_path / "three")):
        assert are_one(again, owner, other)
        with torch.no_grad():
            assert torch.equal(again.eval()(IDS)[0], expected)
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert size == report(small).checkpoint_bytes
    dense = lowrank.decompress(loaded)
    weights = dense.get_submodule(owner).weight, dense.get_submodule(other).weight
    assert (weights[0] is weights[1]) == (tie == "tied")
    with torch.no_grad():
        assert (dense(IDS)[0] - expected).norm() < 0.02 * expected.norm()


@both_ties
def test_recovery_trains_the_one_copy(tie):
    teacher = net(tie)
    small = compress(copy.deepcopy(teacher), rank=16)
    before = small.a.down.weight.detach().clone()
    lowrank.recover(small, teacher, batches(), steps=5)
    assert are_one(small, "a", "c")
    assert not torch.equal(small.a.down.weight, before)
    names = [name for name, _ in small.named_parameters()]
    assert "c.bias" in names
    assert not any(name.startswith("c.") and name != "c.bias" for name in names)


def test_a_copy_counts_in_a_budget_of_bytes_only_while_it_is_there():
    dense = net("copied")
    limit = 4 * (2 * 20 * 2 * SIZE + 3 * SIZE)  # two pairs of factors at rank 20 and all biases
    small = compress(dense, max_bytes=limit, round_to=4)
    assert are_one(small, "a", "c")
    assert sum(p.numel() * 4 for p in small.parameters()) <= limit
    assert small.a.rank + small.b.rank == 40


# Calibrated


def moments_of(inputs: torch.Tensor) -> torch.Tensor:
    centred = inputs.double() - inputs.double().mean(0)
    return centred.T @ centred


@both_ties
def test_the_factors_are_the_optimum_for_what_both_layers_read(tie):
    dense = net(tie)
    data = batches()
    stats = lowrank.calibrate(dense, data, loss=None)
    small = compress(copy.deepcopy(dense), rank=16, stats=stats, metric="inputs")
    x = torch.cat(data)
    with torch.no_grad():
        reads = [x, torch.relu(dense.b(torch.relu(dense.a(x))))]
        weight = dense.a.weight.double()
        gram = sum(moments_of(each) for each in reads)
        lost = weight - small.a.dense_weight().double()
        found = (lost @ gram * lost).sum()
        bound = torch.linalg.eigvalsh(weight @ gram @ weight.T)[:-16].sum()
        assert float(found) == pytest.approx(float(bound), rel=0.02)  # moments are shrunk a little
        for name, each in zip("ac", reads, strict=True):
            error = small.get_submodule(name)(each) - dense.get_submodule(name)(each)
            assert error.mean(0).norm() < 1e-4 * error.norm()


def test_the_loss_metric_sees_both_layers():
    dense = net("tied")
    stats = lowrank.calibrate(dense, batches())
    joint = stats.merged("a", {"a": True, "c": True})
    assert joint.gradients["a"].tokens == stats.gradients["a"].tokens + stats.gradients["c"].tokens
    assert torch.equal(
        joint.gradients["a"].products, stats.gradients["a"].products + stats.gradients["c"].products
    )
    assert torch.equal(joint.moments("a").mean, stats.moments("a").mean)
    assert lowrank.plan(dense, keep=0.5, stats=stats)["c"].rank is not None


@both_ties
def test_calibrated_integers_serve_both_layers_better_than_uncalibrated_ones(tie):
    dense = net(tie)
    stats = lowrank.calibrate(dense, batches(), loss=None)
    plain, scaled = (quantize(net(tie), "int8", stats=known) for known in (None, stats))
    assert scaled.a.input_shift is None  # whose mean would be that of one of the two
    x = batches(12)[-1]
    with torch.no_grad():
        errors = [(model(x) - dense(x)).norm() for model in (plain, scaled)]
    assert errors[1] < errors[0]


def test_statistics_that_lack_one_of_them_leave_both_dense():
    dense = net("tied")
    stats = lowrank.calibrate(dense, batches(), loss=None)
    partial = replace(stats, sources={name: key for name, key in stats.sources.items() if name != "c"})
    plan = lowrank.plan(dense, rank=16, stats=partial)
    assert plan["a"].rank is None
    assert plan["a"].reason == "has its weight in c, too, which was not called during calibration"


# What is refused


@pytest.mark.parametrize("change", ["factors", "codes"])
def test_a_plan_that_changes_one_of_two_tied_layers_is_refused(change):
    model = net("tied")
    before = copy.deepcopy(model.state_dict())
    if change == "factors":
        plan = lowrank.plan(net("copied"), rank=16, ignore=["c"])
        message = r"a: this layer must stay dense: it shares its weight with c\.weight \(tied\)"
    else:
        (code, *_) = lowrank.plan(net(""), rank=16, quantize="int8", targets=["b"]).quantized
        plan = Plan("Net", quantized=(replace(code, name="a", rows=SIZE, columns=SIZE, bias=True),))
        message = r"a: this weight cannot be quantized: it shares its weight with c\.weight \(tied\)"
    with pytest.raises(PlanError, match=message):
        lowrank.apply(model, plan)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_a_plan_for_equal_weights_is_refused_where_they_are_not():
    plan = lowrank.plan(net("copied"), rank=16)
    with pytest.raises(PlanError, match=r"c: is to use the weight of a, but has another"):
        lowrank.apply(net(""), plan)


def test_codes_that_several_layers_use_cannot_be_centred():
    plan = lowrank.plan(net("copied"), rank=16, quantize="int8")
    codes = tuple(
        replace(c, smooth_scale=True, input_shift=True) if c.name == "a.down" else c for c in plan.quantized
    )
    with pytest.raises(PlanError, match=r"a\.down: cannot shift its inputs: several layers use it"):
        lowrank.apply(net("copied"), replace(plan, quantized=codes))


def test_going_through_blocks_one_by_one_looks_for_no_equal_weights():
    blocks = nn.Sequential(*(net("copied") for _ in range(3)))
    small = compress(blocks, rank=16, data=batches(12), sequential=True)
    assert all(isinstance(block.c, LowRankLinear) for block in small)
    plan = lowrank.plan(nn.Sequential(*(net("copied") for _ in range(3))), rank=16)
    with pytest.raises(LowRankError, match="some layers use the factors of others"):
        lowrank.apply(
            nn.Sequential(*(net("copied") for _ in range(3))), plan, sequential=True, data=batches(12)
        )


def test_coding_names_the_owner_only():
    small = quantize(net("tied"))
    assert isinstance(small.a, QuantizedLinear)
    with pytest.raises(LowRankError, match="No weight of Net is left to be quantized"):
        quantize(small)
    with pytest.raises(LowRankError, match=r"c: uses the weight of a module outside of this one"):
        lowrank.decompress(nn.ModuleDict({"c": small.c}))

"""A user overrules the static reading for named layers, after it was tried that nothing changes."""

import copy
from dataclasses import replace

import pytest
import torch
from closeness import SUMS32
from doubtful_layers import Penalized, Twice, X, seeded
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel, BloomConfig, BloomModel

import lowrank
from lowrank import DataError, LowRankLinear, Plan, TargetError
from lowrank.nn import find_layer_type


class Counting(nn.Linear):
    """Computes what nn.Linear does, which its source does not show."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return functional.linear(x, self.weight, self.bias)


class Named(nn.Linear):
    """The same, but it is not made from sizes."""

    def __init__(self, size, name):
        super().__init__(size, size)
        self.name = name

    def forward(self, x):
        assert self.name
        return functional.linear(x, self.weight, self.bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(functional.dropout(x, 0.5, self.training))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.read = nn.Linear(32, 32)
        self.summed = nn.Linear(32, 32)

    def penalty(self) -> torch.Tensor:
        return self.unused.weight.pow(2).sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unused(x @ self.read.weight) + self.summed(self.called(x)) * self.summed.weight.sum()


def same_as_before(model: nn.Module, before: nn.Module) -> bool:
    one, other = model.state_dict(), before.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_subclass_that_turns_out_to_compute_the_same_is_factorized_saved_loaded_and_dense_again(
    dtype, tmp_path
):
    model = seeded(lambda: nn.Sequential(Counting(32, 32), nn.Linear(32, 32))).to(dtype)
    dense = copy.deepcopy(model)
    assert [layer.targeted for layer in lowrank.plan(model, rank=4)] == [False, True]
    state = torch.random.get_rng_state()
    lowrank.compress(model, rank=4, overrule=["0"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(model[0], LowRankLinear)
    small = model(X.to(dtype))
    lowrank.save(model, tmp_path / "folder")
    loaded = lowrank.load(tmp_path / "folder", copy.deepcopy(dense))
    assert torch.equal(loaded(X.to(dtype)), small)
    assert lowrank.report(loaded).factorized[0].name == "0"
    assert type(lowrank.decompress(loaded)[0]) is Counting
    # The product of two bfloat16 factors is rounded again: 0.4%, and sums of it.
    assert torch.allclose(loaded(X.to(dtype)).float(), small.float(), atol=0.02 * float(small.abs().max()))
    assert dense[0].calls == 0  # it was tried on a copy


def test_what_is_overruled_for_one_model_is_in_doubt_in_the_next():
    lowrank.compress(
        seeded(lambda: nn.Sequential(Counting(32, 32), nn.Linear(32, 32))), rank=4, overrule=["0"]
    )
    again = seeded(lambda: nn.Sequential(Counting(32, 32), nn.Linear(32, 32)))
    reason = "is a Counting, which may compute something else than nn.Linear"
    assert lowrank.plan(again, rank=4)["0"].reason == reason
    with pytest.raises(lowrank.WeightError, match="Counting is not a linear layer"):
        LowRankLinear.from_linear(again[0], 4)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (
            lambda: Twice(32, 32),
            "A Twice does not compute what nn.Linear does: on random inputs the outputs differ by 1",
        ),
        (lambda: Noisy(32, 32), "A Noisy does not compute what nn.Linear does in training mode"),
        (
            lambda: Named(32, "a"),
            "A Named, built again from its weight and bias, fails on random inputs: AttributeErr",
        ),
    ],
    ids=["twice", "noisy", "named"],
)
def test_a_subclass_that_computes_something_else_or_cannot_be_built_again_is_refused(layer, why):
    model = seeded(lambda: nn.Sequential(layer(), nn.Linear(32, 32)))
    before = copy.deepcopy(model)
    for call in (lowrank.compress, lowrank.plan):
        with pytest.raises(TargetError, match=rf"^0: overrule= cannot be followed\. {why}.*stays as it is"):
            call(model, rank=4, overrule=["0"])
    assert same_as_before(model, before)


def test_a_weight_that_seems_to_be_read_is_factorized_if_the_outputs_do_not_need_it(tmp_path):
    model = seeded(Penalized)
    dense = copy.deepcopy(model)
    plan = lowrank.plan(model, rank=4, overrule=["*"], inputs=X)
    assert [(layer.name, layer.overruled, layer.rank) for layer in plan] == [
        ("proj", True, 4),
        ("out", True, 4),
    ]
    assert Plan.from_json(plan.to_json()) == plan
    assert same_as_before(model, dense)
    lowrank.apply(model, plan)
    small = model(X)
    lowrank.save(model, tmp_path / "folder")
    loaded = lowrank.load(tmp_path / "folder", copy.deepcopy(dense))
    assert torch.equal(loaded(X), small)
    assert [type(layer) for layer in lowrank.decompress(loaded).children()] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    ("pattern", "layer", "why"),
    [
        ("read", "read", "without its weight Reader fails"),
        ("summed", "summed", r"the outputs differ by .* of their norm"),
        ("*", "read", "without its weight Reader fails"),
    ],
    ids=["fails", "differs", "several"],
)
def test_a_weight_that_is_read_is_refused_and_the_model_is_as_before(pattern, layer, why):
    model = seeded(Reader)
    before = copy.deepcopy(model)
    message = rf"^{layer}: overrule= .* Its weight is read by value in Reader, and that counts: {why}"
    with pytest.raises(TargetError, match=message):
        lowrank.compress(model, rank=4, overrule=[pattern], inputs=X)
    assert same_as_before(model, before)
    assert [type(child) for child in model.children()] == [nn.Linear] * 4


def test_one_of_several_may_be_overruled():
    model = lowrank.compress(seeded(Reader), rank=4, overrule=["unused"], inputs=X)
    assert isinstance(model.unused, LowRankLinear) and type(model.read) is nn.Linear


def test_an_overruled_layer_is_coded_and_given_back():
    model = seeded(lambda: nn.Sequential(Counting(32, 32), nn.Linear(32, 32)))
    lowrank.compress(model, rank={"1": 4}, overrule=["0"], quantize="int8")
    assert isinstance(model[0], lowrank.QuantizedLinear)
    assert type(lowrank.decompress(model)[0]) is Counting


class Doubting(BertModel):
    def penalty(self) -> torch.Tensor:
        return sum(block.output.dense.weight.pow(2).sum() for block in self.encoder.layer)


def test_a_transformers_model_with_an_overruled_layer_is_saved_and_loaded(tmp_path):
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = seeded(lambda: Doubting(config))
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    lowrank.compress(model, rank=4, overrule=["*.output.dense"], inputs=batch)
    assert isinstance(model.encoder.layer[0].output.dense, LowRankLinear)
    model.save_pretrained(tmp_path)
    loaded = Doubting.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert Plan.from_dict(loaded.config.quantization_config.plan).overruled == {
        "encoder.layer.0.output.dense"
    }


def test_bloom_that_multiplies_slices_of_its_weights_is_refused(tmp_path):
    config = BloomConfig(
        vocab_size=99, hidden_size=64, n_layer=1, n_head=4, pretraining_tp=2, slow_but_exact=True
    )
    model = seeded(lambda: BloomModel(config))
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    with pytest.raises(TargetError, match=r"dense: overrule= cannot be followed.*BloomAttention"):
        lowrank.compress(model, rank=4, overrule=["*.self_attention.dense"], inputs=batch)
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="give inputs="):
        BloomModel.from_pretrained(
            tmp_path, quantization_config=lowrank.LowRankConfig(rank=4, overrule=["*.self_attention.dense"])
        )


class ReadsItsHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.proj = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.embed.weight

    def penalty(self):
        return self.lm_head.weight.pow(2).sum()

    def forward(self, x):
        return self.lm_head(self.proj(self.embed(x)))


def test_a_table_changes_with_a_tied_head_whose_doubt_is_overruled():
    model, x = seeded(ReadsItsHead), torch.arange(64).reshape(4, 16)
    with pytest.raises(TargetError, match=r"embed: the embedding .* tied to lm_head, which has its weight"):
        lowrank.compress(model, rank=8, targets=["embed"], inputs=x)
    lowrank.compress(model, rank=8, targets=["embed"], overrule=["lm_head"], inputs=x)
    table = model.embed.dense_weight()
    expected = functional.linear(model.proj(table[x]), table)
    assert torch.allclose(model(x), expected, atol=SUMS32)


def test_a_class_is_not_known_by_its_name_after_a_refusal():
    class Refused(Counting):
        pass

    model = seeded(lambda: nn.Sequential(Refused(32, 32), nn.Linear(32, 32)))
    plan = lowrank.plan(model, rank=4, overrule=["0"])
    wrong = plan.with_layers({"1": replace(plan["1"], in_features=16)})
    with pytest.raises(lowrank.PlanError, match="1: the plan is for a weight"):
        lowrank.apply(model, wrong)
    assert find_layer_type("Refused") is None
    lowrank.apply(model, plan)
    assert find_layer_type("Refused").module is Refused

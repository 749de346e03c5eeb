"""Pivoted factors through the whole library: chosen, stored, loaded, trained, quantized, refused."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank.errors import BudgetError, CheckpointError, PlanError
from lowrank.nn import PivotedUp

FORMS = ["factors", "pivoted"]


def model_of(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48, bias=False)).to(dtype).eval()


@pytest.fixture(scope="module")
def batches():
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, 48)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 48, generator=generator) @ mixing.T for _ in range(8)]


@pytest.fixture(scope="module")
def stats(batches):
    return lowrank.calibrate(model_of(), batches)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    return transformers.BertModel(config).eval()


def is_pivoted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PivotedUp)]


@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_pivoted_factors_lose_less_at_the_same_size(stats, keep):
    plain, free = (lowrank.plan(model_of(), keep=keep, stats=stats, forms=forms) for forms in (None, FORMS))
    assert free.loss_increase < 0.9 * plain.loss_increase
    assert sum(layer.parameters for layer in free) <= keep * sum(layer.dense_parameters for layer in free)
    if keep == 0.8:  # above the break-even rank of plain factors
        assert any(
            layer.rank > replace(layer, pivoted=False).break_even_rank for layer in free if layer.pivoted
        )


def test_an_explicit_rank_means_plain_factors_unless_only_pivots_are_asked_for(stats):
    assert not is_pivoted(lowrank.compress(model_of(), rank=16, stats=stats, forms=FORMS))
    plain = lowrank.compress(model_of(), rank=16, stats=stats)
    pivoted = lowrank.compress(model_of(), rank=16, stats=stats, forms=["pivoted"])
    assert is_pivoted(pivoted) == ["0.up", "2.up"]
    for name in ("0", "2"):
        one, other = plain.get_submodule(name), pivoted.get_submodule(name)
        # The same product, up to float32 roundings that A multiplies by its norm, some 10 here.
        torch.testing.assert_close(one.dense_weight(), other.dense_weight(), rtol=0, atol=1e-5)
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, pivoted)]
    assert counts[0] - counts[1] == 2 * 16**2


@pytest.mark.parametrize("budget", [{"energy": 0.9}, {"error": 0.3}])
def test_a_bound_on_the_error_is_kept_with_fewer_numbers(stats, budget):
    plain, free = (lowrank.plan(model_of(), stats=stats, forms=forms, **budget) for forms in (None, FORMS))
    for layer in free:
        assert layer.pivoted
        assert layer.relative_error <= budget.get("error", 0.1**0.5)  # the error of an energy of 0.9
    assert sum(layer.parameters for layer in free) < sum(layer.parameters for layer in plain)


def test_a_budget_of_bytes_counts_the_order_too(stats, tmp_path):
    small = lowrank.compress(model_of(), max_bytes=17_000, stats=stats, forms=FORMS)
    assert is_pivoted(small)
    folder = lowrank.save(small, tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    assert 14_500 < sum(tensor.nbytes for tensor in tensors.values()) <= 17_000
    assert lowrank.report(small).checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert "pivoted" in str(lowrank.report(small))


def test_a_reloaded_model_gives_the_same_bits(stats, batches, tmp_path):
    small = lowrank.compress(model_of(), keep=0.7, stats=stats, forms=FORMS)
    again = lowrank.load(lowrank.save(small, tmp_path / "small"), model_of())
    assert is_pivoted(again) == is_pivoted(small) != []
    assert torch.equal(again(batches[0]), small(batches[0]))


@pytest.mark.parametrize("how", ["save_pretrained", "lowrank.save"])
def test_a_checkpoint_of_transformers_gives_the_same_bits(bert, how, tmp_path):
    small = lowrank.compress(copy.deepcopy(bert), keep=0.7, forms=FORMS)
    assert is_pivoted(small)
    folder = tmp_path / "small"
    small.save_pretrained(folder) if how == "save_pretrained" else lowrank.save(small, folder)
    again = transformers.AutoModel.from_pretrained(folder)
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(again(ids).last_hidden_state, small(ids).last_hidden_state)


def test_an_order_that_a_stranger_has_changed_is_refused(bert, tmp_path):
    small = lowrank.compress(copy.deepcopy(bert), keep=0.7, forms=FORMS)
    small.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".order"))
    tensors[name][0] = 10_000
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up\.order is no order of"):
        transformers.AutoModel.from_pretrained(tmp_path / "hf")


def test_decompressing_multiplies_back(stats, batches):
    small = lowrank.compress(model_of(), keep=0.7, stats=stats, forms=FORMS)
    y = small(batches[0])
    dense = lowrank.decompress(small)
    assert all(type(dense[i]) is nn.Linear for i in (0, 2))
    torch.testing.assert_close(dense(batches[0]), y, rtol=0, atol=1e-5)


def test_recovery_trains_the_pivots_and_what_they_are_combined_by(batches):
    dense, small = (
        model_of(),
        lowrank.compress(model_of(), keep=0.5, forms=FORMS),
    )  # far from the best factors
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    lowrank.recover(small, dense, batches, steps=100)
    moved = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
    assert {"0.down.weight", "0.up.rest.weight", "2.down.weight", "2.up.rest.weight"} <= moved


def test_autocast_leaves_pivots_in_their_own_precision(batches):
    small = lowrank.compress(model_of(), keep=0.8, forms=["pivoted"])
    with torch.autocast("cpu", torch.bfloat16):
        found = small[0](batches[0])
    assert torch.equal(found, small[0](batches[0]))


def test_quantizing_makes_plain_factors_of_them(stats, batches):
    small = lowrank.compress(model_of(), keep=0.5, stats=stats, forms=FORMS)
    y = small(batches[0])
    coded = lowrank.quantize(small, "int8", stats=stats)
    assert not is_pivoted(coded)
    # int8 rounds weights and inputs to one part in 254 of the largest.
    assert (coded(batches[0]) - y).norm() < 0.03 * y.norm()


def test_a_fit_block_by_block_ends_in_pivots(bert):
    ids = [torch.randint(99, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]
    small = lowrank.compress(copy.deepcopy(bert), keep=0.6, data=data, sequential=True, forms=FORMS)
    assert is_pivoted(small)
    assert small(**data[0]).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_plain_factors(dtype):
    plan = lowrank.plan(model_of(dtype), keep=0.5, forms=FORMS)
    assert not any(layer.pivoted for layer in plan)
    edited = plan.with_layers({layer.name: replace(layer, pivoted=True) for layer in plan})
    with pytest.raises(PlanError, match="pivots would blow up rounding errors"):
        lowrank.apply(model_of(dtype), edited)


def test_a_form_that_a_layer_cannot_have_is_refused(stats):
    plan = lowrank.plan(model_of(), rank=8, stats=stats)
    first, second = plan
    corrects = replace(second, correction=True, pivoted=True)
    too_much = replace(first, rank=48, pivoted=True)
    for layer, message in ((corrects, "only the factors that replace"), (too_much, "leaves no row")):
        with pytest.raises(PlanError, match=message):
            lowrank.apply(model_of(), plan.with_layers({layer.name: layer}), stats=stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": []}, "give a list with one or more of 'factors', 'pivoted'"),
        ({"forms": "pivoted"}, "give a list"),
        ({"forms": ["neurons", "?"]}, "give a list"),
        ({"forms": ["pivoted"], "quantize": "int8"}, "pivoted factors are not quantized"),
    ],
)
def test_forms_that_nothing_has_are_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        lowrank.plan(model_of(), keep=0.5, **options)


def test_a_speedup_is_no_reason_for_pivots():
    with pytest.raises(BudgetError, match="smaller, not faster"):
        lowrank.plan(model_of(), speedup=1.5, inputs=torch.randn(2, 48), forms=FORMS)

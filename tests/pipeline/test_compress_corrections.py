"""``correction=True``: factors that correct a quantized weight, from the request to the checkpoint."""

import copy

import pytest
import torch
from bert_outputs import IDS, QUERY, error, outputs
from closeness import FEW32, SUMS32
from torch import nn

import lowrank
from lowrank import BudgetError, LowRankError, LowRankLinear, Plan, SchemeError, compress, quantize, report


@pytest.mark.parametrize("known", [False, True], ids=["plain", "calibrated"])
def test_a_residual_is_closer_than_its_codes_alone_and_than_factors_alone(tiny_bert, bert_stats, known):
    how = {"stats": bert_stats if known else None, "ignore": ["embeddings.*"]}
    both = compress(copy.deepcopy(tiny_bert), rank=8, correction=True, quantize="int4", **how)
    codes = quantize(copy.deepcopy(tiny_bert), "int4", **how)
    factors = compress(copy.deepcopy(tiny_bert), rank=8, **how)
    assert error(both, tiny_bert) < error(codes, tiny_bert) < error(factors, tiny_bert)


def test_the_layer_is_its_coded_weight_plus_the_product_of_its_factors(tiny_bert, bert_stats):
    small = compress(tiny_bert, rank=8, correction=True, quantize="int4", stats=bert_stats)
    layer = small.get_submodule(QUERY)
    assert isinstance(layer, LowRankLinear)
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = inputs @ layer.dense_weight().T + layer.dense_bias()
        # int4 kernels round inputs to bfloat16, 0.4%, in both products.
        assert torch.allclose(layer(inputs), expected, atol=0.02 * float(expected.abs().max()))
        whole = layer.base.dense_weight() + layer.up.dense_weight() @ layer.down.dense_weight()
    assert torch.allclose(layer.dense_weight(), whole, atol=FEW32)
    assert layer.macs == 64 * 64 + 8 * 128
    assert "correction of int4" in repr(layer)


def test_checkpoints_give_the_same_bits_and_the_reported_bytes(tiny_bert, bert_stats, tmp_path):
    small = compress(tiny_bert, rank=8, correction=True, quantize="int4", stats=bert_stats)
    folder = lowrank.save(small, tmp_path / "small")
    assert (folder / "model.safetensors").stat().st_size == report(small).checkpoint_bytes
    for again in (type(small).from_pretrained(folder), lowrank.load(folder)):
        assert torch.equal(outputs(again.eval()), outputs(small))
        assert again.get_submodule(QUERY).base.codes.dtype == torch.uint8
    found = lowrank.hf.models.recorded(small)
    assert found[QUERY].correction
    assert {c.name for c in found.quantized} >= {f"{QUERY}.base", f"{QUERY}.down", f"{QUERY}.up"}


def test_other_modules_are_saved_and_loaded_too(mlp, tmp_path):
    dense = copy.deepcopy(mlp)
    small = compress(mlp, rank=8, correction=True, quantize="int4")
    folder = lowrank.save(small, tmp_path / "small")
    again = lowrank.load(folder, model=dense)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(inputs), small(inputs))


def test_recover_trains_the_factors_over_the_codes(tiny_bert, bert_stats):
    dense = copy.deepcopy(tiny_bert)
    planned = lowrank.plan(tiny_bert, rank=8, correction=True, quantize="int4", stats=bert_stats)
    bases = tuple(code for code in planned.quantized if code.name.endswith(".base"))
    planned = Plan.from_dict({**planned.to_dict(), "quantized": [vars(code) for code in bases]})
    small = lowrank.apply(tiny_bert, planned, stats=bert_stats)
    codes = small.state_dict()[f"{QUERY}.base.codes"].clone()
    before = error(small, dense)
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(99, (8, 24), generator=generator)} for _ in range(16)]
    lowrank.recover(small, dense, data, steps=60, learning_rate=1e-3, qat=False)
    assert error(small, dense) < 0.97 * before
    assert torch.equal(small.state_dict()[f"{QUERY}.base.codes"], codes)
    quantize(small, "int8", targets=["encoder.*"])  # now the factors
    assert error(small, dense) < before


def test_decompress_multiplies_everything_back(tiny_bert, bert_stats):
    small = compress(tiny_bert, rank=8, correction=True, quantize="int4", stats=bert_stats)
    before = outputs(small)
    lowrank.decompress(small)
    assert type(small.get_submodule(QUERY)) is torch.nn.Linear
    assert torch.allclose(outputs(small), before, atol=0.05)  # integers meet integers no more


def test_a_budget_in_bytes_chooses_the_rank_of_each_residual(tiny_bert, bert_stats):
    how = {"stats": bert_stats, "ignore": ["embeddings.*"]}
    plain = quantize(copy.deepcopy(tiny_bert), "int4", **how)
    limit = sum(t.nbytes for t in (*plain.parameters(), *plain.buffers())) + 8000
    small = compress(copy.deepcopy(tiny_bert), max_bytes=limit, quantize="int4", correction=True, **how)
    assert sum(t.nbytes for t in (*small.parameters(), *small.buffers())) <= limit
    residuals = [m for m in small.modules() if isinstance(m, LowRankLinear)]
    assert residuals
    assert all(m.base is not None for m in residuals)
    assert error(small, tiny_bert) < error(plain, tiny_bert)


@pytest.mark.parametrize(
    ("request_", "error_type", "message"),
    [
        ({"rank": 8, "correction": True}, SchemeError, 'correction=True corrects.*quantize="int4"'),
        ({"keep": 0.5, "correction": True, "quantize": "int4"}, BudgetError, "rank=, or max_bytes="),
        ({"keep": 0.5, "quantize": "auto"}, BudgetError, "by max_bytes= only"),
        ({"speedup": 1.5, "quantize": "int8"}, BudgetError, "floating-point weights"),
        ({"rank": 8, "group_size": 16}, SchemeError, 'group_size=16 is for quantize="int4"'),
        ({"rank": 8, "quantize": "int4", "correction": True, "group_size": 24}, SchemeError, "groups of 24"),
        ({"rank": 8, "quantize": "int3", "correction": True}, SchemeError, "known schemes"),
        ({"rank": 60, "quantize": "int4", "correction": True}, BudgetError, "pays for no correction"),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(tiny_bert, request_, error_type, message):
    before = {name: tensor.clone() for name, tensor in tiny_bert.state_dict().items()}
    with pytest.raises(error_type, match=message):
        compress(tiny_bert, **request_)
    after = tiny_bert.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_sharing_and_going_block_by_block_are_refused(tiny_bert, bert_stats):
    with pytest.raises(BudgetError, match="leave out share="):
        compress(tiny_bert, rank=8, correction=True, quantize="int4", share="inputs", stats=bert_stats)
    data = [{"input_ids": IDS}] * 8
    with pytest.raises(LowRankError, match="not corrections"):
        compress(tiny_bert, rank=8, correction=True, quantize="int4", sequential=True, data=data)


def batches_for_training(count=16):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(99, (8, 24), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("blockwise", [False, True], ids=["whole", "blockwise"])
def test_codes_are_trained_straight_through_their_rounding(tiny_bert, bert_stats, blockwise):
    dense = copy.deepcopy(tiny_bert)
    small = compress(
        tiny_bert, rank=8, correction=True, quantize="int4", stats=bert_stats, ignore=["embeddings.*"]
    )
    known = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    without = copy.deepcopy(small)
    before = error(small, dense)
    lowrank.recover(small, dense, batches_for_training(), steps=80, learning_rate=3e-4, blockwise=blockwise)
    assert error(small, dense) < 0.95 * before
    found = small.state_dict()
    assert found.keys() == known.keys()
    assert {tensor.dtype for name, tensor in found.items() if name.endswith("base.codes")} == {torch.uint8}
    assert not all(torch.equal(found[name], known[name]) for name in found if name.endswith("base.codes"))
    assert all(torch.equal(found[name], known[name]) for name in found if name.endswith(".scale"))
    lowrank.recover(
        without, dense, batches_for_training(), steps=80, learning_rate=3e-4, blockwise=blockwise, qat=False
    )
    assert error(small, dense) < error(without, dense)


def test_dense_layers_that_are_coded_can_be_recovered_without_any_factor(tiny_bert, bert_stats):
    dense = copy.deepcopy(tiny_bert)
    small = quantize(tiny_bert, "int4", stats=bert_stats, ignore=["embeddings.*"])
    before = error(small, dense)
    lowrank.recover(small, dense, batches_for_training(), steps=80)
    assert error(small, dense) < before


def test_loosened_codes_are_the_same_weight_until_they_are_trained():
    for scheme in (lowrank.linalg.Scheme("int8"), lowrank.linalg.Scheme("int4", 16)):
        weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
        moments = weight.T.double() @ weight.double()
        layer = lowrank.QuantizedLinear.from_weight(weight, None, scheme, moments=moments)
        codes, inputs = layer.codes.clone(), torch.randn(3, 32)
        decoded = inputs @ layer.dense_weight().T
        layer.start_qat()
        assert torch.allclose(layer(inputs), decoded, atol=SUMS32)
        layer(inputs).square().sum().backward()
        straight = 2 * decoded.T @ inputs  # as if nothing were rounded
        assert torch.allclose(layer.latent.grad, straight, rtol=1e-3, atol=1e-3)
        layer.finish_qat()
        assert torch.equal(layer.codes, codes)


def test_an_interrupted_recovery_leaves_codes(tiny_bert, bert_stats, monkeypatch):
    dense = copy.deepcopy(tiny_bert)
    small = quantize(tiny_bert, "int8", stats=bert_stats)
    keys = set(small.state_dict())

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(lowrank.distillation.recovery.Trainer, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lowrank.recover(small, dense, batches_for_training(), steps=4)
    assert set(small.state_dict()) == keys
    assert small.get_submodule(QUERY).latent is None


def test_the_report_counts_the_coded_weight_of_a_residual(tiny_bert, bert_stats):
    dense = report(tiny_bert)
    planned = lowrank.plan(tiny_bert, rank=8, correction=True, quantize="int4", stats=bert_stats)
    found = report(lowrank.apply(tiny_bert, planned, stats=bert_stats))
    layer = next(layer for layer in found.layers if layer.name == QUERY)
    assert layer.scheme == "int8 + int4" or layer.scheme == "int4 + int8"
    module = tiny_bert.get_submodule(QUERY)
    assert layer.bytes == sum(part.stored_bytes for part in (module.base, module.up, module.down))
    # as far as the headers of the two files differ
    assert found.checkpoint_bytes_before == pytest.approx(dense.checkpoint_bytes, abs=30_000)


def test_an_edited_layer_of_a_plan_with_codes_can_be_applied(tiny_bert, bert_stats):
    for how in ({"quantize": "int8"}, {"quantize": "int4", "correction": True}):
        planned = lowrank.plan(tiny_bert, rank=8, stats=bert_stats, **how)
        for rank in (4, None):
            edited = planned.with_rank(QUERY, rank)
            assert not any(code.name.startswith(QUERY) for code in edited.quantized)
            assert "float" in str(edited)
            (change,) = planned.diff(edited)
            assert "int8" in str(change)
            small = lowrank.apply(copy.deepcopy(tiny_bert), edited, stats=bert_stats)
            assert (small.get_submodule(QUERY).rank if rank else None) == rank


@pytest.mark.parametrize("call", [lowrank.decompress, quantize, lambda m: compress(m, rank=2)])
@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Linear(64, 64),
        torch.nn.Embedding(50, 64),
        lowrank.LowRankLinear(64, 64, 8),
        lowrank.LowRankEmbedding(50, 64, 8),
        quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)))[0],
        quantize(torch.nn.Sequential(torch.nn.Embedding(50, 64)))[0],
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_layer_that_is_the_model_is_refused(call, module):
    names = list(dict(module.named_modules()))
    with pytest.raises(LowRankError, match=f"is itself a {type(module).__name__}.*holds it"):
        call(module)
    assert list(dict(module.named_modules())) == names


def test_the_report_counts_the_products_of_a_layer_that_uses_a_corrected_weight():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    compress(model, rank=8, correction=True, quantize="int4")
    assert isinstance(model[1], lowrank.nn.TiedLinear)
    assert [layer.macs for layer in report(model).layers] == [64 * 64 + 8 * 128] * 2

"""Recovery: what it trains, what it keeps, and that it never returns a worse model."""

import copy
import warnings

import pytest
import torch
from closeness import agreement
from random_tensors import gaussian
from torch import nn

import lowrank
from lowrank import CheckpointError, DataError, LowRankError, compress, recover
from lowrank.distillation.recovery import trainable


def distance(model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        inputs = gaussian(500, 64, seed=99)
        return float((model(inputs) - teacher(inputs)).square().sum() / teacher(inputs).square().sum())


def test_it_brings_the_model_closer_to_its_teacher(mlp, small, data):
    before = distance(small, mlp)
    recover(small, mlp, data, steps=200, learning_rate=3e-3, mixed_precision=False)
    assert distance(small, mlp) < 0.8 * before


def test_a_model_with_hidden_states_and_embeddings_is_recovered(tiny_bert):
    small = compress(copy.deepcopy(tiny_bert), rank=8)
    ids = [
        {"input_ids": torch.randint(99, (4, 8), generator=torch.Generator().manual_seed(i))} for i in range(8)
    ]

    def closeness(model):
        with torch.no_grad():
            first, second = (m(**ids[0]).last_hidden_state.mean(1) for m in (model, tiny_bert))
        return agreement(first, second)

    before = closeness(small)
    recover(small, tiny_bert, ids, steps=60, learning_rate=3e-3)
    assert closeness(small) > before


def test_the_teacher_and_everything_that_is_not_trained_stay_as_they_were(tiny_bert):
    small = compress(copy.deepcopy(tiny_bert), rank=8)
    small.train()
    small.embeddings.word_embeddings.weight.requires_grad_(False)
    teacher = {name: value.clone() for name, value in tiny_bert.state_dict().items()}
    embedding = small.embeddings.word_embeddings.weight.clone()
    grads = [p.requires_grad for p in small.parameters()]
    state = torch.get_rng_state()
    data = [{"input_ids": torch.arange(8)[None] + i} for i in range(4)]
    recover(small, tiny_bert, data, steps=3)
    assert all(torch.equal(teacher[name], value) for name, value in tiny_bert.state_dict().items())
    assert torch.equal(small.embeddings.word_embeddings.weight, embedding)
    assert [p.requires_grad for p in small.parameters()] == grads
    assert all(p.grad is None for p in small.parameters())
    assert all(module.training for module in small.modules())
    assert not tiny_bert.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in [*small.modules(), *tiny_bert.modules()])


def test_factors_biases_and_norms_are_trained_and_embeddings_are_not(tiny_bert):
    small = compress(tiny_bert, rank=8)
    chosen = {id(p) for p in trainable(small)}
    names = {name for name, p in small.named_parameters() if id(p) in chosen}
    assert "encoder.layer.0.output.dense.up.weight" in names
    assert "encoder.layer.0.output.dense.up.bias" in names
    assert "encoder.layer.0.output.LayerNorm.weight" in names
    assert "embeddings.word_embeddings.weight" not in names
    assert "pooler.dense.weight" not in names


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_narrower_layers_are_trained(tiny_bert, allocation):
    """Under uniform widths they are ordinary layers, of which only the teacher tells that they changed."""
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 90, (8, 12), generator=generator)} for _ in range(8)]
    options = {"forms": ["neurons"], "keep": 0.5, "data": data, "allocation": allocation}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lowrank.FewTokensWarning)
        small = compress(copy.deepcopy(tiny_bert), **options)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    recover(small, tiny_bert, data, steps=20)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"encoder.layer.0.{name}.dense.weight" for name in ("intermediate", "output")} <= changed
    assert "encoder.layer.0.attention.self.query.weight" not in changed


def test_a_learning_rate_that_ruins_the_model_returns_it_unharmed(mlp, small, data):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    recover(small, mlp, data, steps=40, learning_rate=1e3, mixed_precision=False)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_the_same_seed_gives_the_same_model(mlp, data):
    models = [compress(copy.deepcopy(mlp), rank=8) for _ in range(2)]
    for model in models:
        recover(model, mlp, data, steps=10, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("blockwise", [False, True], ids=["whole", "blockwise"])
def test_the_teacher_may_be_on_another_device(tiny_bert, blockwise):
    small = compress(copy.deepcopy(tiny_bert), rank=8).to("cuda")
    rows = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    rows["attention_mask"][1, 8:] = 0
    before = small.encoder.layer[0].output.dense.up.weight.clone()
    recover(small, tiny_bert, [rows] * 4, steps=8, learning_rate=3e-3, blockwise=blockwise)
    assert not torch.equal(small.encoder.layer[0].output.dense.up.weight, before)


def test_a_teacher_of_another_shape_is_refused(small, data):
    with pytest.raises(DataError, match="dense model that it was made from"):
        recover(small, nn.Sequential(nn.Linear(64, 5)), data, steps=1, hidden_weight=0)


@pytest.mark.parametrize(("width", "depth"), [(64, 3), (32, 5)], ids=["wider", "deeper"])
def test_a_teacher_with_other_blocks_is_refused(width, depth):
    transformers = pytest.importorskip("transformers")

    def masked(width, depth):
        size = {"intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
        config = transformers.BertConfig(hidden_size=width, num_hidden_layers=depth, **size)
        return transformers.BertForMaskedLM(config)

    model = lowrank.compress(masked(32, 3), rank=4)
    with pytest.raises(DataError, match=f"teacher has {depth} blocks and the compressed model 3"):
        recover(model, masked(width, depth), [{"input_ids": torch.ones(2, 8, dtype=torch.long)}] * 8, steps=1)


BAD = {
    "no-duration": ({}, LowRankError, "minutes or steps"),
    "two-durations": ({"minutes": 1, "steps": 1}, LowRankError, "minutes or steps"),
    "negative": ({"steps": -1}, LowRankError, "positive"),
    "no-number": ({"minutes": float("nan")}, LowRankError, "positive"),
    "text": ({"steps": "3"}, LowRankError, "whole number"),
    "rate": ({"steps": 1, "learning_rate": -1}, LowRankError, "learning_rate=-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(mlp, small, data, case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        recover(small, mlp, data, **arguments)


def test_a_model_without_any_parameter_is_recovered_by_its_codes(data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 64, bias=False)).eval()
    coded = lowrank.quantize(copy.deepcopy(dense), "int4", on_missing_kernel="allow")
    assert not list(coded.parameters())
    before = distance(coded, dense)
    recover(coded, dense, data, steps=60, learning_rate=1e-3)
    assert not list(coded.parameters())
    assert distance(coded, dense) < before
    state = {name: tensor.clone() for name, tensor in coded.state_dict().items()}
    with pytest.raises(LowRankError, match=r"Sequential has no factor, bias or norm to train.*qat=False"):
        recover(coded, dense, data, steps=1, qat=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in coded.state_dict().items())


def test_a_dense_model_has_nothing_to_recover(mlp, data):
    with pytest.raises(LowRankError, match="Compress it first"):
        recover(mlp, copy.deepcopy(mlp), data, steps=1)


def test_a_model_cannot_be_its_own_teacher(small, data):
    with pytest.raises(LowRankError, match="Keep a copy"):
        recover(small, small, data, steps=1)


def test_one_batch_is_too_little(mlp, small, data):
    with pytest.raises(DataError, match="held out"):
        recover(small, mlp, data[:1], steps=1)


@pytest.mark.parametrize("damage", ["other-model", "truncated", "not-json", "newer"])
def test_a_snapshot_that_does_not_fit_is_refused_and_the_model_is_as_it_was(
    mlp, small, data, tmp_path, damage
):
    run = tmp_path / "run"
    recover(small, mlp, data, steps=4, checkpoint_dir=run)
    if damage == "truncated":
        (run / "snapshot.safetensors").write_bytes((run / "snapshot.safetensors").read_bytes()[:-4])
    elif damage == "not-json":
        (run / "snapshot.json").write_text("{")
    elif damage == "newer":
        (run / "snapshot.json").write_text('{"format": 99}')
    model = compress(copy.deepcopy(mlp), rank=4 if damage == "other-model" else 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="run"):
        recover(model, mlp, data, steps=4, checkpoint_dir=run)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

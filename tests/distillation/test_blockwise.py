"""Recovery block by block: closer to the teacher, one block's graph at a time, and never a worse model."""

import copy
import itertools
import json
import time

import pytest
import torch
from closeness import SUMS32
from torch import nn

import lowrank.distillation.trainer
from lowrank import CheckpointError, DataError, LowRankError, compress, recover
from lowrank.calibration.data import as_batch
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.recovery import trainable
from lowrank.distillation.trainer import mean_distance
from lowrank.inspection.blocks import find_blocks, output_of, outputs_of

LAYERS = 3
OPTIONS = {"learning_rate": 3e-3, "mixed_precision": False, "blockwise": True}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=99,
            initializer_range=0.1,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=99,
            initializer_range=0.1,
        )
    )


def stack() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.Sequential(*[Residual() for _ in range(LAYERS)]), nn.LayerNorm(64)
    )


KINDS = {"bert": bert, "llama": llama, "sequential": stack}


def made(kind: str) -> tuple[nn.Module, nn.Module, list]:
    """A teacher, its compressed copy, and batches; token batches have padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = KINDS[kind]().eval()
        data: list = [torch.randn(16, 64) for _ in range(12)]
        if kind != "sequential":
            data = [{"input_ids": torch.randint(99, (8, 12)), "attention_mask": padded()} for _ in range(12)]
    return teacher, compress(copy.deepcopy(teacher), rank=8), data


def padded() -> torch.Tensor:
    return (torch.arange(12) < torch.randint(6, 13, (8, 1))).long()


def distance(teacher: nn.Module, small: nn.Module, data: list) -> float:
    distillation_loss = DistillationLoss(small, teacher)
    with distillation_loss.listening():
        every = [as_batch(given) for given in data]
        return mean_distance(distillation_loss.distance, every, torch.device("cpu"))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_brings_the_model_closer_to_its_teacher_and_trains_nothing_but_blocks(kind):
    teacher, small, data = made(kind)
    before, loss = state(small), distance(teacher, small, data)
    dense = state(teacher)
    recover(small, teacher, data, steps=20 * LAYERS, **OPTIONS)
    assert distance(teacher, small, data) < 0.95 * loss  # rank 8 is little for random weights
    blocks = tuple(f"{name}." for name in find_blocks(teacher))
    changed = {name for name, value in small.state_dict().items() if not torch.equal(before[name], value)}
    assert all(any(name.startswith(block) for name in changed) for block in blocks)
    assert all(name.startswith(blocks) for name in changed)
    assert same(teacher, dense)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_reads_what_the_recovered_blocks_before_it_make(kind):
    teacher, small, data = made(kind)
    names, batch = list(find_blocks(teacher)), as_batch(data[0])
    distillation_loss = DistillationLoss(small, teacher)
    with (
        torch.no_grad(),
        outputs_of(find_blocks(teacher).values()) as its,
        outputs_of(small.get_submodule(name) for name in names) as mine,
    ):
        batch.call(teacher), batch.call(small)
        x, t = batch.real(mine[1]), batch.real(its[1])
        expected = float(((x - t).square().sum(-1) / t.square().sum(-1)).mean())
    assert distillation_loss.block_distance(names[1], batch).item() == pytest.approx(expected, rel=SUMS32)


@pytest.mark.parametrize("kind", KINDS)
def test_only_one_block_at_a_time_has_gradients(kind, monkeypatch):
    teacher, small, data = made(kind)
    seen = []

    def looked(parameters):
        named = small.named_parameters()
        seen.append({name for name, p in named if p.requires_grad or p.grad is not None})

    monkeypatch.setattr(lowrank.distillation.trainer, "average_gradients", looked)
    recover(small, teacher, data, steps=LAYERS, **OPTIONS)
    names = list(find_blocks(teacher))
    for name, found in zip(names, seen, strict=True):
        block = small.get_submodule(name)
        chosen = {id(parameter) for parameter in trainable(block)}
        assert found == {f"{name}.{n}" for n, p in block.named_parameters() if id(p) in chosen}


class Kept:
    """What autograd keeps for the backward pass: bytes now, and at most."""

    now = most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.bytes = tensor.numel() * tensor.element_size()
        Kept.now += self.bytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_that_of_one_block(kind):
    most = {}
    for blockwise in (False, True):
        teacher, small, data = made(kind)
        Kept.now = Kept.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            recover(small, teacher, data, steps=LAYERS, **{**OPTIONS, "blockwise": blockwise})
        most[blockwise] = Kept.most
    assert 0 < most[True] < 1.1 * most[False] / LAYERS


@pytest.mark.parametrize("blockwise", [False, True], ids=["whole", "blockwise"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failed_call_leaves_everything_as_it_was(error, blockwise):
    teacher, small, data = made("bert")
    small.train()
    small.encoder.layer[1].output.dense.up.weight.requires_grad_(False)
    teacher.encoder.layer[0].train()
    for number, parameter in enumerate(small.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    before, modes = state(small), [m.training for m in [*small.modules(), *teacher.modules()]]
    required = [p.requires_grad for p in [*small.parameters(), *teacher.parameters()]]
    random, counter = torch.get_rng_state(), itertools.count(1)

    def fail(*_):
        if next(counter) == 6:
            raise error

    handle = teacher.encoder.layer[0].register_forward_hook(fail)
    with pytest.raises((error, DataError), match=r"^$|Batch|stopped"):
        recover(small, teacher, data, steps=300, **{**OPTIONS, "learning_rate": 1e3, "blockwise": blockwise})
    handle.remove()
    assert same(small, before)
    assert [m.training for m in [*small.modules(), *teacher.modules()]] == modes
    assert [p.requires_grad for p in [*small.parameters(), *teacher.parameters()]] == required
    assert all(bool((p.grad == number).all()) for number, p in enumerate(small.parameters()))
    assert all(p.grad is None for p in teacher.parameters())
    modules = [*small.modules(), *teacher.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_an_interrupt_keeps_the_blocks_that_are_done():
    teacher, small, data = made("bert")
    loss, counter = distance(teacher, small, data), itertools.count(1)
    before = state(small)

    def stop(*_):
        if next(counter) == 10:
            raise KeyboardInterrupt

    handle = teacher.encoder.layer[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        recover(small, teacher, data, steps=60, **OPTIONS)
    handle.remove()
    changed = {name for name, value in small.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.split(".")[2] for name in changed} == {"0", "1"}
    assert distance(teacher, small, data) < loss


def test_the_same_seed_gives_the_same_model():
    models = []
    for _ in range(2):
        teacher, small, data = made("bert")
        models.append(recover(small, teacher, data, steps=9, seed=3, **OPTIONS))
    assert same(models[0], state(models[1]))


def test_a_learning_rate_that_ruins_every_block_returns_the_model_unharmed():
    teacher, small, data = made("llama")
    before = state(small)
    recover(small, teacher, data, steps=12, **{**OPTIONS, "learning_rate": 1e3})
    assert same(small, before)


def test_blocks_that_are_closer_are_not_kept_where_the_whole_model_is_not(monkeypatch):
    teacher, small, data = made("bert")
    before, counter, whole = state(small), itertools.count(1), DistillationLoss.distance
    monkeypatch.setattr(DistillationLoss, "distance", lambda *args: whole(*args) * next(counter))
    recover(small, teacher, data, steps=30, **OPTIONS)
    assert next(counter) > LAYERS + 1
    assert same(small, before)


def test_a_block_that_training_makes_worse_stays_as_it_was(monkeypatch):
    teacher, small, data = made("bert")
    before, right = state(small), DistillationLoss.block_distance
    names = list(find_blocks(teacher))

    def wrong(distillation_loss, name, batch):
        sign = -1 if name == names[1] and torch.is_grad_enabled() else 1
        return sign * right(distillation_loss, name, batch)

    monkeypatch.setattr(DistillationLoss, "block_distance", wrong)
    recover(small, teacher, data, steps=60, **OPTIONS)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.split(".")[2] for name in changed} == {"0", "2"}


def test_steps_are_divided_evenly_over_the_blocks(monkeypatch):
    teacher, small, data = made("bert")
    trained = []
    spied = DistillationLoss.block_distance

    def spy(distillation_loss, name, batch):
        if torch.is_grad_enabled():
            trained.append(name)
        return spied(distillation_loss, name, batch)

    monkeypatch.setattr(DistillationLoss, "block_distance", spy)
    recover(small, teacher, data, steps=11, **OPTIONS)
    assert [trained.count(name) for name in find_blocks(teacher)] == [3, 4, 4]
    assert trained == sorted(trained)


def test_minutes_are_divided_over_the_blocks_and_kept():
    teacher, small, data = made("bert")
    seen, start = [], time.monotonic()
    for block in find_blocks(teacher).values():
        seen.append([])
        block.register_forward_hook(lambda *_, times=seen[-1]: times.append(time.monotonic()))
    recover(small, teacher, data, minutes=2 / 60, **OPTIONS)
    assert time.monotonic() - start < 5
    assert all(len(times) > 20 for times in seen)


def test_a_run_that_was_interrupted_goes_on_to_the_same_end(tmp_path):
    teacher, whole, data = made("bert")
    nibbles = copy.deepcopy(whole)
    recover(whole, teacher, data, steps=30, **OPTIONS)
    counter = itertools.count(1)

    def stop(*_):
        if torch.is_grad_enabled() and next(counter) == 5:
            raise KeyboardInterrupt

    handle = nibbles.encoder.layer[1].output.register_forward_hook(stop)
    options = {"steps": 30, "checkpoint_dir": tmp_path / "run", **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        recover(nibbles, teacher, data, **options)
    handle.remove()
    assert json.loads((tmp_path / "run" / "snapshot.json").read_text())["blocks"] == 1
    recover(nibbles, teacher, data, **options)
    assert same(nibbles, state(whole))
    recover(nibbles, teacher, data, **options)  # a finished run is not trained again
    assert same(nibbles, state(whole))


@pytest.mark.parametrize("blockwise", [False, True], ids=["whole", "blockwise"])
def test_a_snapshot_of_the_other_kind_is_refused(tmp_path, blockwise):
    teacher, small, data = made("bert")
    options = {"steps": LAYERS, "checkpoint_dir": tmp_path / "run"}
    recover(small, teacher, data, blockwise=not blockwise, **options)
    with pytest.raises(CheckpointError, match="block by block" if not blockwise else "as a whole"):
        recover(small, teacher, data, blockwise=blockwise, **options)


def test_a_model_without_blocks_is_refused(mlp):
    small, data = compress(copy.deepcopy(mlp), rank=8), [torch.randn(4, 64) for _ in range(4)]
    with pytest.raises(LowRankError, match=r"no stack of repeated blocks.*blockwise=False"):
        recover(small, mlp, data, steps=4, blockwise=True)


def test_fewer_steps_than_blocks_are_refused():
    teacher, small, data = made("bert")
    with pytest.raises(LowRankError, match="steps=2 for 3 blocks"):
        recover(small, teacher, data, steps=2, blockwise=True)


def test_a_teacher_with_other_blocks_is_refused():
    _, small, data = made("sequential")
    deeper = nn.Sequential(
        nn.Linear(64, 64), nn.Sequential(*[Residual() for _ in range(4)]), nn.LayerNorm(64)
    )
    with pytest.raises(LowRankError, match=r"no 1\.3, a block of the teacher"):
        recover(small, deeper, data, steps=8, blockwise=True)


def test_what_comes_before_a_block_has_no_graph():
    model = stack()
    blocks = find_blocks(model)
    inputs = torch.randn(2, 64, requires_grad=True)
    output_of("1.1", blocks["1.1"], lambda: model(inputs)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"1.1.{name}" for name, _ in blocks["1.1"].named_parameters()
    }
    assert inputs.grad is None


def test_a_block_that_the_model_does_not_call_is_named():
    block = nn.Linear(4, 4)
    with pytest.raises(LowRankError, match=r"layers\.7 is not called"):
        output_of("layers.7", block, lambda: None)
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


def test_a_block_without_hidden_states_is_named():
    class Odd(nn.Module):
        def forward(self):
            return {"hidden": 1}

    block = Odd()
    with pytest.raises(LowRankError, match="odd returns dict, no hidden states"):
        output_of("odd", block, block)

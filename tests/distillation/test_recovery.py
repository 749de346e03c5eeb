"""Recovery: what it trains, what it keeps, and that it never returns a worse model."""

import copy

import pytest
import torch
from closeness import agreement
from torch import nn

import lowrank
from lowrank import CheckpointError, DataError, LowRankError, compress, recover
from lowrank.calibration.data import as_batch
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.recovery import trainable
from lowrank.distillation.trainer import schedule


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def data():
    return [made(32, 64, seed=i) for i in range(12)]


@pytest.fixture
def small(mlp):
    return compress(copy.deepcopy(mlp), rank=8)


def distance(model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        inputs = made(500, 64, seed=99)
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


def test_a_learning_rate_that_ruins_the_model_returns_it_unharmed(mlp, small, data):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    recover(small, mlp, data, steps=40, learning_rate=1e3, mixed_precision=False)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_an_interrupt_leaves_the_best_state_and_no_hooks(mlp, small, data, monkeypatch):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    calls = []

    def interrupted(module, args, output):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    handle = mlp.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(small, mlp, data, steps=500, learning_rate=1e3, mixed_precision=False)
    handle.remove()
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_the_same_seed_gives_the_same_model(mlp, data):
    models = [compress(copy.deepcopy(mlp), rank=8) for _ in range(2)]
    for model in models:
        recover(model, mlp, data, steps=10, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_minutes_are_kept(mlp, small, data):
    import time

    start = time.monotonic()
    recover(small, mlp, data, minutes=1 / 60)
    assert time.monotonic() - start < 5


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


def test_the_schedule_rises_and_falls_to_zero():
    values = [schedule(i / 100) for i in range(101)]
    assert values[0] < 0.1
    assert max(values) == pytest.approx(1, abs=0.01)
    assert values.index(max(values)) == 5
    assert values[-1] == pytest.approx(0, abs=1e-9)


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


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: x[:, :0], r"Batch \d+: output of shape \(32, 0\) has no elements to match"),
        (lambda x: None, "The teacher returns NoneType, in which there is no tensor to match"),
        (lambda x: x.long(), "The teacher returns Tensor, in which there is no tensor to match"),
        (lambda x: x.detach(), r"Batch \d+: no gradient of the distance to the teacher"),
    ],
    ids=["empty", "none", "integers", "detached"],
)
def test_outputs_that_cannot_be_matched_are_refused(mlp, data, outputs, message):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = copy.deepcopy(mlp)

        def forward(self, x):
            return outputs(self.layers(x))

    dense = Model()
    small = compress(copy.deepcopy(dense), rank=8)
    with pytest.raises(DataError, match=message):
        recover(small, dense, data, steps=1)


def test_a_dense_model_has_nothing_to_recover(mlp, data):
    with pytest.raises(LowRankError, match="Compress it first"):
        recover(mlp, copy.deepcopy(mlp), data, steps=1)


def test_a_model_cannot_be_its_own_teacher(small, data):
    with pytest.raises(LowRankError, match="Keep a copy"):
        recover(small, small, data, steps=1)


def test_one_batch_is_too_little(mlp, small, data):
    with pytest.raises(DataError, match="held out"):
        recover(small, mlp, data[:1], steps=1)


def test_a_run_that_was_interrupted_goes_on_to_the_same_end(mlp, data, tmp_path):
    whole, nibbles = (compress(copy.deepcopy(mlp), rank=8) for _ in range(2))
    options = {"steps": 16, "learning_rate": 3e-3, "mixed_precision": False}
    recover(whole, mlp, data, **options)
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    handle = mlp.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(nibbles, mlp, data, checkpoint_dir=tmp_path / "run", **options)
    handle.remove()
    recover(nibbles, mlp, data, checkpoint_dir=tmp_path / "run", **options)
    for mine, its in zip(nibbles.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("moment", [2, 3, 4, 5, 6, 7, 8, 11, "within a step"])
def test_a_run_that_goes_on_looks_where_an_undisturbed_one_does(
    mlp, small, data, tmp_path, moment, monkeypatch
):
    """Interrupted after any forward pass of the teacher, and halfway through the optimizer's parameters.

    The learning rate is so high that the best state is not the last.
    """
    options = {"steps": 5, "learning_rate": 0.03, "mixed_precision": False}
    recover(copy.deepcopy(small), mlp, data, checkpoint_dir=tmp_path / "whole", **options)
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt

    def torn(optimizer, *_):
        calls.append(1)
        if len(calls) < 8:
            return step(optimizer)
        optimizer.param_groups[0]["params"][0].data.add_(1)
        raise KeyboardInterrupt

    step = torch.optim.AdamW.step
    handle = mlp.register_forward_hook(interrupted)
    with monkeypatch.context() as patch:
        if moment == "within a step":
            patch.setattr(torch.optim.AdamW, "step", torn)
        with pytest.raises(KeyboardInterrupt):
            recover(copy.deepcopy(small), mlp, data, checkpoint_dir=tmp_path / "halves", **options)
    handle.remove()
    recover(copy.deepcopy(small), mlp, data, checkpoint_dir=tmp_path / "halves", **options)
    for name in ("snapshot.json", "snapshot.safetensors"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_not_trained_again(mlp, small, data, tmp_path):
    recover(small, mlp, data, steps=4, checkpoint_dir=tmp_path / "run")
    before = {name: value.clone() for name, value in small.state_dict().items()}
    recover(small, mlp, data, steps=4, checkpoint_dir=tmp_path / "run")
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_a_run_whose_gradients_were_not_numbers_can_be_called_again(mlp, small, data, tmp_path):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    handle = small[0].up.weight.register_hook(lambda gradient: gradient * float("nan"))
    for _ in range(2):
        recover(small, mlp, data, steps=4, mixed_precision=False, checkpoint_dir=tmp_path / "run")
        assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    handle.remove()


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


def test_a_trainer_recovers_a_model_within_its_own_loop(tiny_bert, tmp_path):
    from transformers import TrainingArguments

    from lowrank.hf.trainer import RecoveryTrainer

    small = compress(copy.deepcopy(tiny_bert), rank=8)
    rows = [
        {"input_ids": [(3 * i + j) % 98 + 1 for j in range(8)], "attention_mask": [1] * 8} for i in range(32)
    ]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RecoveryTrainer(model=small, args=arguments, train_dataset=rows, teacher=tiny_bert)
    embedding = small.embeddings.word_embeddings.weight.clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(small.embeddings.word_embeddings.weight, embedding)


@pytest.mark.parametrize(("rate", "better"), [(3e-4, True), (100.0, False)], ids=["learns", "diverges"])
def test_a_trainer_leaves_the_best_state_on_the_data_that_it_does_not_train_on(
    tiny_bert, tmp_path, rate, better
):
    from transformers import TrainingArguments

    from lowrank.hf.trainer import RecoveryTrainer

    small = compress(copy.deepcopy(tiny_bert), rank=8)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    rows = [
        {"input_ids": [(3 * i + j) % 98 + 1 for j in range(8)], "attention_mask": [1] * 8} for i in range(24)
    ]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=rate,
        max_grad_norm=1e9,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RecoveryTrainer(
        model=small, args=arguments, train_dataset=rows[8:], eval_dataset=rows[:8], teacher=tiny_bert
    )
    at_first = trainer.evaluate()["eval_loss"]
    trainer.train()
    at_last = trainer.evaluate()["eval_loss"]
    assert at_last < at_first if better else at_last == at_first
    same = all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    assert same is not better


def test_a_lesson_works_under_distributed_data_parallel(tiny_bert, tmp_path):
    import torch.distributed as dist

    small = compress(copy.deepcopy(tiny_bert), rank=8)
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    for parameter in trainable(small):
        parameter.requires_grad_(True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small)
        distillation_loss = DistillationLoss(small, tiny_bert)
        with distillation_loss.listening():
            _, loss = distillation_loss.outputs_and_distance(
                as_batch({"input_ids": torch.arange(8)[None]}), wrapped
            )
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert small.encoder.layer[0].output.dense.up.weight.grad.norm() > 0

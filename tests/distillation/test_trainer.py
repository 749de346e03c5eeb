"""The training loop of `recover`: its schedule, and how it stops and goes on."""

import copy

import pytest
import torch
from closeness import SUMS64

from lowrank import compress, recover
from lowrank.distillation.trainer import schedule


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


def test_minutes_are_kept(mlp, small, data):
    import time

    start = time.monotonic()
    recover(small, mlp, data, minutes=1 / 60)
    assert time.monotonic() - start < 5


def test_the_schedule_rises_and_falls_to_zero():
    values = [schedule(i / 100) for i in range(101)]
    assert values[0] < 0.1
    assert max(values) == pytest.approx(1, abs=0.01)  # it is looked at a hundred times
    assert values.index(max(values)) == 5
    assert values[-1] == pytest.approx(0, abs=SUMS64)


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

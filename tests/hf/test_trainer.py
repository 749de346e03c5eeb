"""Fine-tuning goes on as before on a compressed model: a plain loop, Trainer, and LoRA from PEFT."""

import pytest
import torch
import transformers
from closeness import LAYERS32
from torch import nn

import lowrank
from lowrank import LowRankLinear


def classifier(dropout: float = 0.1) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=99,
        num_labels=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def examples(count: int = 16) -> dict[str, torch.Tensor]:
    """Sequences whose label is whether they start with a high token."""
    ids = torch.randint(5, 99, (count, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": (ids[:, 0] > 50).long()}


class Sequences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in examples().items()}


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model.eval()(**examples()).loss)


def train(model: nn.Module, steps: int = 30) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**examples()).loss.backward()
        optimizer.step()


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": parameter
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for part, parameter in module.named_parameters()
    }


def test_the_usual_loop_lowers_the_loss():
    model = lowrank.compress(classifier(), rank=8)
    before = loss_of(model)
    train(model)
    assert loss_of(model) < before / 2


def test_gradients_reach_both_factors_and_the_bias_of_every_layer():
    model = lowrank.compress(classifier(), rank=8).train()
    model(**examples()).loss.backward()
    found = factors(model)
    assert len(found) == 12 * 3
    without = [name for name, p in found.items() if p.grad is None or not p.grad.abs().sum() > 0]
    # the bias of a key shifts all attention scores of a query alike, which softmax ignores
    assert [name for name in without if not name.endswith("key.up.bias")] == []


def test_an_optimizer_step_changes_every_factor():
    model = lowrank.compress(classifier(), rank=8)
    before = {name: p.detach().clone() for name, p in factors(model).items()}
    train(model, steps=1)
    assert not [name for name, p in factors(model).items() if torch.equal(p, before[name])]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_training_mode_stays(mode):
    model = lowrank.compress(classifier().train(mode), rank=8)
    assert {module.training for module in model.modules()} == {mode}


def test_frozen_layers_stay_frozen():
    model = classifier()
    frozen = model.bert.encoder.layer[0].requires_grad_(False)
    lowrank.compress(model, rank=8)
    assert {p.requires_grad for p in factors(frozen).values()} == {False}
    assert {p.requires_grad for p in factors(model.bert.encoder.layer[1]).values()} == {True}


def test_gradient_checkpointing_gives_the_same_gradients():
    model = lowrank.compress(classifier(dropout=0.0), rank=8).train()
    model(**examples()).loss.backward()
    expected = {name: p.grad.clone() for name, p in factors(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**examples()).loss.backward()
    for name, parameter in factors(model).items():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_trained_model_is_saved_and_loaded(tmp_path):
    model = lowrank.compress(classifier(), rank=8)
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert loss_of(again) == loss_of(model)


def test_a_loaded_model_can_be_trained(tmp_path):
    lowrank.compress(classifier(), rank=8).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    before = loss_of(model)
    train(model)
    assert loss_of(model) < before / 2


# --- Trainer


def trainer(model: nn.Module, folder, steps: int):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Sequences())


def test_trainer_lowers_the_loss(tmp_path):
    model = lowrank.compress(classifier(), rank=8)
    before = loss_of(model)
    trainer(model, tmp_path, steps=20).train()
    assert loss_of(model) < before / 2


@pytest.mark.parametrize("start", ["compressed", "loaded"])
def test_trainer_resumes_from_a_checkpoint_as_if_never_stopped(start, tmp_path):
    def model() -> nn.Module:
        small = lowrank.compress(classifier(), rank=8)
        if start == "compressed":
            return small
        small.save_pretrained(tmp_path / "start")
        return type(small).from_pretrained(tmp_path / "start")

    whole = trainer(model(), tmp_path / "whole", steps=4)
    whole.train()
    resumed = trainer(model(), tmp_path / "resumed", steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, expected), (_, actual) in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(actual, expected, msg=name)


def test_a_checkpoint_of_trainer_loads_with_from_pretrained(tmp_path):
    model = lowrank.compress(classifier(), rank=8)
    trainer(model, tmp_path, steps=2).train()
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert loss_of(again) == loss_of(model)


# --- LoRA


TARGETS = {
    "one-factor": ["query.down"],
    "both-factors": ["query.down", "query.up"],
    "all-linear": "all-linear",
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_lora_attaches_to_the_factors_and_trains(targets):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    base = lowrank.compress(classifier(), rank=8)
    frozen = {name: p.detach().clone() for name, p in factors(base).items()}
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert [name for name in adapted if "query.down" in name]
    assert bool([name for name in adapted if "query.up" in name]) == (targets != ["query.down"])
    before = loss_of(model)
    train(model)
    assert loss_of(model) < before
    assert [p for name, p in model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    merged = factors(model.unload())
    assert all(torch.equal(merged[name], tensor) for name, tensor in frozen.items())


def test_merging_lora_keeps_factorized_layers_and_the_outputs(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    config = peft.LoraConfig(r=4, target_modules=["query.down", "value.up"], task_type="SEQ_CLS")
    model = peft.get_peft_model(lowrank.compress(classifier(), rank=8), config)
    train(model, steps=5)
    before = loss_of(model)
    merged = model.merge_and_unload()
    assert isinstance(merged.bert.encoder.layer[0].attention.self.query, LowRankLinear)
    assert loss_of(merged) == pytest.approx(before, rel=LAYERS32)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loss_of(again) == loss_of(merged)


def test_an_adapter_is_saved_and_attached_again(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    base = lowrank.compress(classifier(), rank=8)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["query.down"], task_type="SEQ_CLS")
    )
    train(model, steps=5)
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert loss_of(again) == loss_of(model)

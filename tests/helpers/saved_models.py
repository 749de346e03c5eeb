"""Small models of many families of transformers, and what is compared when they come back from a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lowrank
from lowrank import LowRankLinear

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
BERT = {**SIZES, "vocab_size": 99}


def bert(cls: str, **more) -> nn.Module:
    return getattr(transformers, cls)(transformers.BertConfig(**BERT, **more))


def gpt2(cls: str = "GPT2LMHeadModel") -> nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    return getattr(transformers, cls)(config)


def llama(**more) -> nn.Module:
    config = transformers.LlamaConfig(**BERT, num_key_value_heads=2, max_position_embeddings=64, **more)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=99, dim=64, hidden_dim=128, n_layers=2, n_heads=4)
    return transformers.DistilBertForSequenceClassification(config)


def roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT, max_position_embeddings=64))


def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(**BERT, pad_token_id=0, max_position_embeddings=64)
    return transformers.ModernBertForMaskedLM(config)


FAMILIES = {
    "bert": lambda: bert("BertModel"),
    "bert-sequence-classification": lambda: bert("BertForSequenceClassification", num_labels=3),
    "bert-question-answering": lambda: bert("BertForQuestionAnswering"),
    "bert-masked-lm-tied": lambda: bert("BertForMaskedLM"),
    "gpt2-conv1d-tied": gpt2,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "vit": vit,
    "t5": t5,
    "distilbert": distilbert,
    "roberta": roberta,
    "modernbert": modernbert,
}
every_family = pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES.keys())


def built(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def small(build=FAMILIES["bert"], **budget) -> nn.Module:
    return lowrank.compress(built(build), **(budget or {"rank": 8}))


def outputs(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        dtype = next(model.parameters()).dtype
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
    else:
        inputs = {"input_ids": torch.randint(5, 99, (2, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        result = model.eval()(**inputs)
    return [leaf for leaf in tree_leaves(result.to_tuple()) if isinstance(leaf, Tensor)]


def assert_same_outputs(first: nn.Module, second: nn.Module) -> None:
    before, after = outputs(first), outputs(second)
    assert len(before) == len(after) > 0
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def structure(model: nn.Module) -> list[tuple[str, str, int | None]]:
    return [(n, type(m).__name__, getattr(m, "rank", None)) for n, m in model.named_modules()]


def factorized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


def change_tensors(folder: Path, change) -> Path:
    """Pass each safetensors file's tensors to ``change``, and write back what it leaves; return the last."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return file


LAYER = "encoder.layer.1.output.dense"


def mixtral() -> nn.Module:
    sizes = {**BERT, "num_key_value_heads": 2, "num_local_experts": 2, "max_position_embeddings": 64}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def flip(tensors: dict[str, Tensor], name: str) -> None:
    if name in tensors:
        tensors[name].view(-1)[7] *= -1


by_transformers = transformers.BertModel.from_pretrained

"""Small models whose head is tied to an embedding."""

import pytest
import torch
import transformers
from torch import nn

from lowrank import (
    compress,
    quantize,
)
from lowrank.nn import TiedLinear

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ROWS = 99
IDS = torch.arange(96).reshape(4, 24) % ROWS


def masked_lm() -> nn.Module:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=ROWS))
    with torch.no_grad():
        model.cls.predictions.bias.normal_()  # which is tied to that of the head
    return model


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=ROWS, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=95
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=ROWS, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


FAMILIES = {
    "bert": (masked_lm, "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "llama": (llama, "model.embed_tokens", "lm_head"),
    "gpt2": (gpt2, "transformer.wte", "lm_head"),
}
every_family = pytest.mark.parametrize(("build", "table", "head"), FAMILIES.values(), ids=FAMILIES.keys())
HOW = ("factors", "int8", "int4", "factors+int8", "factors+int4")
every_way = pytest.mark.parametrize("how", HOW)


def made_small(model: nn.Module, table: str, how: str) -> nn.Module:
    if not how.startswith("factors"):
        return quantize(model, how)
    return compress(model, rank=32, targets=["*", table], quantize=how.partition("+")[2] or None)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def are_one(model: nn.Module, table: str, head: str) -> bool:
    found = model.get_submodule(head)
    return isinstance(found, TiedLinear) and found.owner is model.get_submodule(table)


def batches_of(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Token ids of which small ones are far more frequent, and ids from 90 on never come."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": (90 * torch.rand(4, 24, generator=generator) ** 3).long()} for _ in range(count)]

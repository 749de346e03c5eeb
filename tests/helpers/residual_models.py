"""Small models of transformers with three blocks, their inputs, and their hidden states."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)


def bert():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    return BertModel(BertConfig(vocab_size=100, max_position_embeddings=32, **size)).eval()


def llama(**more):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **size, **more)).eval()


def gpt2():
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 32}
    return GPT2Model(GPT2Config(vocab_size=100, bos_token_id=0, eos_token_id=0, **size)).eval()


def ids(count=8, first=0):
    make = [torch.Generator().manual_seed(first + i) for i in range(count)]
    return [{"input_ids": torch.randint(100, (4, 16), generator=generator)} for generator in make]


def hidden(model, batches=None):
    with torch.no_grad():
        return torch.cat([model(**batch)[0] for batch in batches or ids(2, first=100)])

"""Small models whose layers may share a factor, their inputs, and plans that are changed by hand."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lowrank.plans.plan import Plan


def bert(cls=BertModel, blocks=2, alike=0.0):
    """A small BERT; with ``alike`` the weights of its blocks have that much in common."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": blocks}
    model = cls(BertConfig(vocab_size=100, max_position_embeddings=32, **size)).eval()
    base = model if cls is BertModel else model.bert
    first = dict(base.encoder.layer[0].named_parameters())
    for block in base.encoder.layer[1:]:
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2:
                parameter.data.lerp_(first[name].data, alike)
    return model


def llama(blocks=2):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": blocks}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **size)).eval()


def ids(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(100, (2, 16), generator=generator)} for _ in range(count)]


def hidden(model):
    with torch.no_grad():
        return model(**ids(1, seed=9)[0])[0]


def changed(decided: Plan, name: str, **fields) -> Plan:
    data = decided.to_dict()
    for layer in data["layers"]:
        if layer["name"] == name:
            layer.update(fields)
    return Plan.from_dict(data)

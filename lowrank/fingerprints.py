"""Numbers that tell models and tokenizers apart, from a sample of their content."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from lowrank.nn import LowRankLinear, kind_of

_SAMPLES = 1024
"""Values read of each weight: two models of one shape, one of them trained further, differ in all."""


def fingerprint_of_model(model: nn.Module) -> str:
    """Return a digest of the names, shapes and a sample of the values of the linear layers."""
    state = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear) or kind_of(module) is not None:
            for key, parameter in module.named_parameters():
                state.update(f"{name}.{key}{tuple(parameter.shape)}".encode())
                if not parameter.is_meta:
                    values = parameter.detach().flatten()
                    sample = values[:: max(1, len(values) // _SAMPLES)]
                    state.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return state.hexdigest()[:16]


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """Return a digest of the class and the vocabulary; of no tokenizer, an empty string."""
    if tokenizer is None:
        return ""
    vocabulary = tokenizer.get_vocab() if callable(getattr(tokenizer, "get_vocab", None)) else {}
    text = json.dumps([type(tokenizer).__name__, vocabulary], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

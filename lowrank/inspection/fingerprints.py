"""Digests that tell weights, tokenizers and data apart: what statistics were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 1024
"""Values read of each weight: two models of one shape, one of them trained further, differ in all."""


def fingerprint_of_layer(layer: nn.Module) -> str:
    """Return a digest of the shape and a sample of the values of a layer's weight."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    state = hashlib.sha256(str(tuple(weight.shape)).encode())
    if not weight.is_meta:
        values = weight.detach().flatten()
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


@dataclass(frozen=True)
class Fingerprint:
    """What statistics were made from: digests that differ when the thing differs.

    Args:
        layers: By layer name, of its weight. Layers that have been factorized since do not matter.
        tokenizer: Of its class and vocabulary; empty without one.
        data: Of the batches, in whatever order.
    """

    layers: Mapping[str, str]
    tokenizer: str
    data: str

"""Modules that run at inference. They know tensors, not plans."""

from lowrank.nn.dense import DenseKind, kind_named, kind_of, register
from lowrank.nn.linear import LowRankLinear
from lowrank.nn.quantized import Coded, QuantizedEmbedding, QuantizedLinear

__all__ = [
    "Coded",
    "DenseKind",
    "LowRankLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "kind_named",
    "kind_of",
    "register",
]

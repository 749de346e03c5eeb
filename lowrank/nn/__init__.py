"""Modules that run at inference. They know tensors, not plans."""

from lowrank.nn.embedding import LowRankEmbedding
from lowrank.nn.layer_types import DenseKind, find_kind, kind_named, kind_of, register
from lowrank.nn.linear import LowRankLinear
from lowrank.nn.quantized import Coded, QuantizedEmbedding, QuantizedLinear
from lowrank.nn.shared import SharedCodes, SharedDown
from lowrank.nn.tied import TiedLinear

__all__ = [
    "Coded",
    "DenseKind",
    "LowRankEmbedding",
    "LowRankLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SharedCodes",
    "SharedDown",
    "TiedLinear",
    "find_kind",
    "kind_named",
    "kind_of",
    "register",
]

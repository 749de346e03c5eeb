"""Modules that run at inference. They know tensors, not plans."""

from lowrank.nn.embedding import LowRankEmbedding
from lowrank.nn.layer_types import (
    LayerType,
    find_layer_type,
    layer_type_named,
    layer_type_of,
    register_layer_type,
)
from lowrank.nn.linear import LowRankLinear
from lowrank.nn.narrower import features_before, forget_features_before, narrower_layer, take_features_before
from lowrank.nn.pivoted_up import PivotedUp
from lowrank.nn.quantized import QuantizedEmbedding, QuantizedModule
from lowrank.nn.quantized_linear import QuantizedLinear
from lowrank.nn.shared import SharedDown, SharedQuantizedDown
from lowrank.nn.tied_linear import TiedLinear

__all__ = [
    "LayerType",
    "LowRankEmbedding",
    "LowRankLinear",
    "PivotedUp",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "SharedDown",
    "SharedQuantizedDown",
    "TiedLinear",
    "features_before",
    "find_layer_type",
    "forget_features_before",
    "layer_type_named",
    "layer_type_of",
    "narrower_layer",
    "register_layer_type",
    "take_features_before",
]

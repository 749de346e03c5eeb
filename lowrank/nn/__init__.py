"""Modules that run at inference. They know tensors, not plans."""

from lowrank.nn.dense import DenseKind, kind_named, kind_of, register
from lowrank.nn.linear import LowRankLinear

__all__ = ["DenseKind", "LowRankLinear", "kind_named", "kind_of", "register"]

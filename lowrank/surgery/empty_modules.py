"""Make compressed modules without data, on the meta device: loading a checkpoint fills them."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.nn import (
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    SharedDown,
    SharedQuantizedDown,
)
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.stored_tensors import scheme_of


def empty_embedding(layer: LayerPlan, dense: nn.Embedding) -> LowRankEmbedding:
    """Make the factorized embedding that ``layer`` describes."""
    new = LowRankEmbedding(
        *(layer.out_features, layer.in_features, layer.rank or 0, layer.has_bias),
        padding_idx=dense.padding_idx,
        device="meta",
        dtype=dense.weight.dtype,
    )
    new.relative_error = layer.relative_error
    return new


def empty_quantized(stored: QuantizedWeight, old: nn.Module) -> QuantizedModule:
    """Make the module that ``stored`` describes, on the meta device; a bias stays."""
    scheme = scheme_of(stored)
    dtype: torch.dtype = old.weight.dtype  # type: ignore[assignment,union-attr]
    if stored.is_embedding:
        padding: int | None = old.padding_idx  # type: ignore[assignment]
        return QuantizedEmbedding(
            stored.rows, stored.columns, scheme, padding_idx=padding, device="meta", dtype=dtype
        )
    new = empty_linear(stored, dtype, SharedQuantizedDown if isinstance(old, SharedDown) else QuantizedLinear)
    bias: nn.Parameter | None = old.bias  # type: ignore[assignment]
    new.register_parameter("bias", bias)
    return new


def empty_linear(
    stored: QuantizedWeight, dtype: torch.dtype, cls: type[QuantizedLinear] = QuantizedLinear
) -> QuantizedLinear:
    """Make the layer that ``stored`` describes, without a bias."""
    flags = {"smooth_scale": stored.smooth_scale, "input_shift": stored.input_shift}
    sizes, scheme = (stored.columns, stored.rows), scheme_of(stored)
    return cls(*sizes, False, scheme, layer_type=stored.layer_type, **flags, device="meta", dtype=dtype)

"""Where a model is, and in which dtype it computes; where all is quantized, no parameter tells."""

from __future__ import annotations

import itertools

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; of a model without any, the CPU."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first weight or other parameter; of a model without any, PyTorch's default.

    The weight of a quantized layer is a buffer without elements, which has the dtype that the layer computes
    in.
    """
    weights = (buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "weight")
    first = next(itertools.chain(model.parameters(), weights), None)
    return first.dtype if first is not None else torch.get_default_dtype()

"""Random tensors, each from a seed of its own, and a loss of them."""

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian64(*shape: int, seed: int = 0) -> Tensor:
    return gaussian(*shape, seed=seed, dtype=torch.float64)


def summed(outputs, batch):
    """A user's loss: the mean over the batch of a smooth function of the outputs."""
    return outputs.square().sum(-1).mean()

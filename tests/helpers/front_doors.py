"""The options of compression, and a small model to ask for them."""

import torch
from torch import nn

from lowrank.config import CompressionConfig
from lowrank.config.options import options_of

OPTIONS = {one.name: one for one in options_of(CompressionConfig)}


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))

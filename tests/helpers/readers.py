"""A model with layers at every depth; tests derive classes that read some of them by value."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.other(x))


class Model(nn.Module):
    """Layers at every depth; the tests' classes read some of them by value."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.called = nn.Linear(32, 32)
        self.block = Block()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.named = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})

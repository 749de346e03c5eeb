"""Layers that look as if they computed something else, or whose weights seem to be read."""

import torch
from torch import nn


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Penalized(nn.Module):
    """Reads weights by value where its outputs do not show it: a penalty, and inputs that never come."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)

    def penalty(self) -> torch.Tensor:
        return self.proj.weight.pow(2).sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim > 3:
            return x @ self.out.weight
        return self.out(self.proj(x).relu())


def seeded(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))

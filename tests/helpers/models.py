"""Small models of the kinds that several tests need."""

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class ResNet(nn.Module):
    """As torchvision's: convolutions, and one linear layer called ``fc``."""

    def __init__(self, head: str = "fc") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, bias=False)
        self.layer1 = nn.Sequential(Residual(32), Residual(32))
        self.layer2 = nn.Sequential(Residual(32), Residual(32))
        self.head_name = head
        self.add_module(head, nn.Linear(32, 100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.conv1(x))).mean((2, 3))
        return self.get_submodule(self.head_name)(x)

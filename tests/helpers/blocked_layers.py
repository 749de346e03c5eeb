"""Which layers of a model are targets, and why one is none."""

import re

import pytest
import torch
from torch import nn

from lowrank.errors import TargetError
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft


def targeted(model: nn.Module, **patterns: list[str]) -> set[str]:
    return {layer.name for layer in draft(Inspection(model), **patterns).targeted}


class Holder(nn.Module):
    """A model of three 32×32 layers, one of them named by the test."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        for name, child in children.items():
            self.add_module(name, child)
        self.last = nn.Linear(32, 32)


def blocked(model: nn.Module, name: str) -> str:
    """Check that the layer stays dense by default, that naming it is an error, and return the reason."""
    reason = draft(Inspection(model))[name].reason
    assert name not in targeted(model)
    with pytest.raises(
        TargetError,
        match=re.escape(f"{name}: this layer cannot be factorized: it {reason}. Take it out of targets"),
    ):
        draft(Inspection(model), [name])
    return reason


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)

"""Builders that several test files share."""

import torch

from lowrank.linalg import (
    Scheme,
)

INT4, INT8 = Scheme("int4", 16), Scheme("int8")


def some(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def gram_of(features, seed=1):
    factor = (
        some(features, 2 * features, seed) * torch.linspace(0.1, 3, features, dtype=torch.float64)[:, None]
    )
    return factor @ factor.T

"""Rotate the inner dimensions of two factors at random, so that integers hold them well."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.linalg.metric import powers_of_two
from lowrank.linalg.svd import balanced


def rotated(left: Tensor, right: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Bring ``left (out, rank)`` to orthonormal columns, and rotate the inner dimensions at random.

    The product stays, and every row of ``right (rank, in)`` becomes a mixture of all: rows of one size,
    without outliers, which integers hold best. In float16, which could not hold all of the product's size in
    one factor, the columns are as long as they must be. With more columns than rows, and where a factor would
    leave the range of its dtype all the same, the factors stay as they are.
    """
    rank = left.shape[1]
    if rank > left.shape[0]:
        return left, right
    basis, triangle = torch.linalg.qr(left.double())
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rank, rank, generator=generator, dtype=torch.float64).to(left.device)
    turn: Tensor = torch.linalg.qr(noise).Q
    columns, rows = basis @ turn, turn.T @ triangle @ right.double()
    largest = min(torch.finfo(left.dtype).max, torch.finfo(torch.float32).max)  # scales are float32
    if left.dtype == torch.float16:
        columns, rows = balanced(columns, rows, together=True)
    elif bool(rows.abs().amax() > largest):
        shift = powers_of_two((rows.abs().amax() / columns.abs().amax()).sqrt())
        columns, rows = columns * shift, rows / shift
    fit = bool(torch.stack([columns.abs().amax(), rows.abs().amax()]).amax() <= largest)
    return (columns.to(left.dtype), rows.to(right.dtype)) if fit else (left, right)

"""Integers of unlike width within a row: many bits for the components that matter, few for the others.

The factor ``D`` of an embedding ``E ≈ D U`` has components that are uncorrelated and of very unlike size,
once ``U`` is orthonormal under the metric. At a given number of bits the error is least if every component
that is kept loses the same: each bit more halves a component's error, so wide components get more of them.
That is transform coding with reverse water-filling (Huang & Schultheiss 1963; Cover & Thomas 2006, 10.3.3).

The widths are in the scheme's name: ``"bits6433"`` stores the first 32 columns in 6 bits each, the next 32 in
4, and so on. A group of 32 elements of a row has a scale, a power of 2^¼ in one byte.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lowrank.linalg.metric import Metric
from lowrank.linalg.schemes import StorageScheme, register_scheme_family

GROUP = 32
"""Columns of one width; those of a row share a scale."""

WIDTHS = range(1, 9)
"""Bits that a group can have."""

_LOWEST = 160
"""The exponent byte of the scale 1, in steps of a quarter of an octave; the byte 0 is the scale 0."""

_HALF_STEPS = (0.798, 0.497, 0.293, 0.167, 0.092, 0.053, 0.029, 0.017)
"""Half of the step that loses least of a normal variable of variance 1, by width (Max 1960, by search)."""

_TRIED = range(-3, 5)
"""Scales that are tried for each group, in quarters of an octave from that of a normal variable."""


class MixedWidths(StorageScheme):
    """A scheme with a width for each group of `GROUP` columns.

    An integer of ``w`` bits stands for an odd number from ``1 − 2^w`` to ``2^w − 1``, so that one bit is a
    sign. The codes of a group lie plane by plane: 4 bytes with the lowest bits, 4 with the next, and so on.
    """

    codes_dtype = torch.uint8
    scale_dtype = torch.uint8
    smallest, largest = 1e-8, 1e6  # with what scales of one byte can hold

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.name = "bits" + "".join(map(str, widths))
        self.widths = widths

    @property
    def columns(self) -> int:
        """The only number of columns that a weight can have."""
        return GROUP * len(self.widths)

    def codes_per_row(self, columns: int) -> int:
        """Return how many bytes the codes of a row have."""
        return GROUP // 8 * sum(self.widths)

    def scales_per_row(self, columns: int, group_size: int | None) -> int:
        """Return the number of groups."""
        return len(self.widths)

    def quantize(
        self, weight: Tensor, group_size: int | None, feedback: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return codes and exponents of a float32 ``weight``; columns are rounded on their own."""
        codes, exponents = [], []
        for group, width in zip(torch.split(weight, GROUP, 1), self.widths, strict=True):
            exponent = best_exponents(group, width)
            odd = _nearest(group, _power(exponent)[:, None], width)
            numbers, shifts = (odd.int() + 2**width - 1) >> 1, torch.arange(width, device=odd.device)
            codes.append(_packed((numbers[:, None] >> shifts[:, None]) & 1).flatten(1))
            exponents.append(exponent)
        return torch.cat(codes, 1), torch.stack(exponents, 1)

    def integers(self, codes: Tensor) -> Tensor:
        """Return the odd numbers that codes stand for, ``(…, columns)``."""
        bits = (codes.to(torch.int32)[..., None] >> torch.arange(8, device=codes.device)) & 1
        found, start = [], 0
        for width in self.widths:
            planes = bits[..., start : start + GROUP // 8 * width, :].reshape(*codes.shape[:-1], width, GROUP)
            powers = 2 ** torch.arange(width, device=codes.device, dtype=torch.int32)
            found.append(2 * (planes * powers[:, None]).sum(-2) - (2**width - 1))
            start += GROUP // 8 * width
        return torch.cat(found, -1)

    def scales(self, scale: Tensor) -> Tensor:
        """Return the scales that exponent bytes stand for."""
        return _power(scale)


def best_exponents(group: Tensor, width: int) -> Tensor:
    """Return for each row of ``group (rows, columns)`` the byte whose scale loses the least."""
    spread = group.square().mean(1).sqrt() * _HALF_STEPS[width - 1]
    first = (4 * spread.clamp(min=1e-30).log2()).round() + _LOWEST
    best, least = torch.zeros_like(first), group.square().sum(1)
    for step in _TRIED:
        exponent = (first + step).clamp(1, 255)
        scale = _power(exponent)[:, None]
        lost = (group - _nearest(group, scale, width) * scale).square_().sum(1)
        better = lost < least
        best, least = torch.where(better, exponent, best), torch.where(better, lost, least)
    return best.to(torch.uint8)


def rounded(group: Tensor, width: int) -> Tensor:
    """Return ``group (rows, columns)`` as it will be once it is stored in ``width`` bits."""
    scale = _power(best_exponents(group, width))[:, None]
    return _nearest(group, scale, width) * scale


def even_components(left: Tensor, right: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Scale the components of ``left (rows, rank)`` and ``right (rank, columns)``; their product stays.

    Within a group the rows of ``right`` then have one norm under ``metric``: an error in any component of
    ``left`` counts the same. Groups of ``left`` have one size, so that the one scale of a row, which int8
    products with ``right`` use, serves all of them.
    """
    norms = torch.linalg.vector_norm(metric.inputs.times_root(right.double()), dim=1)
    sizes = norms * torch.linalg.vector_norm(metric.outputs.enter(left.double()), dim=0)
    for start in range(0, len(norms), GROUP):
        group = slice(start, start + GROUP)
        norms[group] /= sizes[group].square().mean().sqrt()
    norms = torch.where((norms > 0) & norms.isfinite(), norms, 1.0)
    return (left.double() * norms).to(left.dtype), (right.double() / norms[:, None]).to(right.dtype)


def _nearest(group: Tensor, scale: Tensor, width: int) -> Tensor:
    """Return the odd numbers nearest to ``group / scale`` that ``width`` bits hold."""
    most = 2**width - 1
    odd = group / torch.where(scale > 0, scale, 1.0)
    return odd.sub_(1).mul_(0.5).round_().mul_(2).add_(1).clamp_(-most, most)


def _power(exponent: Tensor) -> Tensor:
    power = torch.exp2((exponent.to(torch.float32) - _LOWEST) / 4)
    return torch.where(exponent > 0, power, 0.0)


def _packed(bits: Tensor) -> Tensor:
    """Put bits ``(…, columns)`` into bytes ``(…, columns / 8)``, the first into the lowest place."""
    powers = 2 ** torch.arange(8, dtype=torch.int32, device=bits.device)
    return (bits.reshape(*bits.shape[:-1], -1, 8) * powers).sum(-1).to(torch.uint8)


def _named(name: str) -> MixedWidths | None:
    found = re.fullmatch(r"bits([1-8]{1,512})", name)
    return MixedWidths(tuple(map(int, found[1]))) if found else None


register_scheme_family(_named)

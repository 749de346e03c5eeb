"""Choose how many bits each group of an embedding's components gets, along the whole range of rates.

Rows of an embedding are looked up, not multiplied, so that no kernel limits how they are stored. Errors of
every width are measured once; then bits are given, one after another, where they gain most per bit
(`lowrank.linalg.mixed_widths`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowrank.allocation.candidates import QuantizationLoss
from lowrank.linalg import (
    Diagonal,
    Metric,
    Scheme,
    rounding_error_of,
    truncated_svd,
    weight_quantization_error,
)
from lowrank.linalg.mixed_widths import GROUP, WIDTHS, even_components, rounded
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.storage_formats import INT8, StorageFormat
from lowrank.surgery.factorization import matrix_of

DRAWS = 8192
"""Rows that errors are measured on, drawn by how much they count."""


def row_width_losses(
    embedding: nn.Module, layer: LayerPlan, metric: Metric, seed: int = 0
) -> dict[StorageFormat, QuantizationLoss]:
    """Return the formats of unlike widths that are worth their bits, and what each loses of ``embedding``.

    Each has its own rank, which its scheme says.
    """
    rank = min(layer.in_features, layer.out_features) // GROUP * GROUP
    if not rank:
        return {}
    factors = truncated_svd(matrix_of(embedding, layer, metric).float(), rank, metric)
    components, directions = even_components(factors.left, factors.right, metric)
    lost = _lost_by_width(_drawn(components, metric, seed), directions, metric)
    found = {}
    for widths in _worth_their_bits(lost):
        kept = range(len(widths))
        share = sum(lost[group][widths[group]] for group in kept) / sum(lost[group][0] for group in kept)
        storage_format = StorageFormat(Scheme("bits" + "".join(map(str, widths))))
        found[storage_format] = QuantizationLoss(
            factors=share + _lost_in_directions(directions[: GROUP * len(widths)], metric)
        )
    return found


def _lost_in_directions(directions: Tensor, metric: Metric) -> float:
    """Return the share that int8 loses of ``directions (rank, columns)``, and of the rows they multiply."""
    return weight_quantization_error(
        directions.T, rounding_error_of(directions.T, INT8), INT8, Metric(outputs=metric.inputs)
    )


def _drawn(components: Tensor, metric: Metric, seed: int) -> Tensor:
    """Draw rows with replacement, by their weights under ``metric``."""
    weights = metric.outputs.values if isinstance(metric.outputs, Diagonal) else torch.ones(len(components))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(weights.cpu().double(), DRAWS, replacement=True, generator=generator)
    return components[drawn.to(components.device)]


def _lost_by_width(components: Tensor, directions: Tensor, metric: Metric) -> list[list[float]]:
    """Return for each group of components its squared norm, and what of it every width loses."""
    found = []
    for group, rows in zip(torch.split(components, GROUP, 1), torch.split(directions, GROUP), strict=True):
        counts = metric.inputs.times_root(rows.double()).square().sum().item() / GROUP
        lost = (group - rounded(group, width) for width in WIDTHS)
        found.append([counts * float(values.square().sum()) for values in (group, *lost)])
    return found


def _worth_their_bits(lost: list[list[float]]) -> Iterator[tuple[int, ...]]:
    """Yield widths along the lower convex hull of bits against loss, from few bits to many.

    A group without bits ends the row: components are in the order of their size.
    """
    widths = [0] * len(lost)
    while True:
        gains = [
            ((lost[group][width] - lost[group][more]) / (more - width), group, more)
            for group, width in enumerate(widths)
            for more in range(width + 1, WIDTHS.stop)
        ]
        gain, group, more = max(gains, default=(0.0, 0, 0))
        if gain <= 0:
            return
        widths[group] = more
        kept = [width for width in widths if width]
        if all(widths[: len(kept)]):
            yield tuple(kept)

"""The choices of rank and storage format that the solver is offered for each layer or group of layers.

Where weights may be quantized, a list of candidates has the ranks of each storage format
(`lowrank.plans.storage_formats`), and the quantized whole weight.

Of layers that may share ``down``, some may share ``down`` while others have factors of their own. Each
way to divide them is a partition, with one list of candidates per part; which partition is best depends on
the budget. That a feed-forward block loses neurons is one more partition of its layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from lowrank.allocation.solver import Curve, allocate, hull_segments
from lowrank.linalg import ErrorCurve
from lowrank.plans.layer_plan import (
    LayerPlan,
    QuantizedWeight,
    largest_shared_rank,
    parameters_per_shared_rank,
)
from lowrank.plans.storage_formats import FLOAT, StorageFormat


class Group(NamedTuple):
    """Layers that may share ``down``: of one input, or of one role in adjacent blocks.

    Args:
        names: All of them, in the model's order.
        joint: By the names of those that share ``down``, the whole group among them, the error of each;
            nothing where errors decide nothing.
    """

    names: tuple[str, ...]
    joint: Mapping[tuple[str, ...], tuple[ErrorCurve, ...]]


class Offer(Curve, ABC):
    """What layers can become: choices whose costs and losses the solver compares.

    Attributes:
        layers: The layers.
        ranks: Of each point; 0 where the layers have none.
        formats: Of each point, how what is there is stored.
    """

    layers: tuple[LayerPlan, ...]
    ranks: np.ndarray[Any, Any]
    formats: tuple[StorageFormat, ...]

    @abstractmethod
    def layers_at(self, point: int) -> list[LayerPlan]:
        """Return the layers as they are at ``point``."""

    @abstractmethod
    def quantized_at(self, point: int, calibrated: Container[str]) -> list[QuantizedWeight]:
        """Return what is quantized at ``point``; ``calibrated`` are the layers with statistics."""

    @abstractmethod
    def priced(self, costs: np.ndarray[Any, Any]) -> Offer:
        """Return the same choices with other costs, less what another point beats."""


@dataclass(frozen=True)
class Candidates(Offer):
    """What one layer, or several with one ``down``, can become; the last point leaves the weights whole.

    Args:
        layers: The layers.
        ranks: Of each point; 0 leaves the weights whole.
        formats: Of each point, how what is there is stored.
    """

    layers: tuple[LayerPlan, ...]
    ranks: np.ndarray[Any, Any]
    formats: tuple[StorageFormat, ...]

    def layers_at(self, point: int) -> list[LayerPlan]:
        """Return the layers as they are at ``point``."""
        rank, storage_format = int(self.ranks[point]), self.formats[point]
        if rank:
            layers = sharing(self.layers, rank, "chosen by the solver")
            corrects, pivoted = storage_format.correction, storage_format.pivoted
            return [replace(x, correction=corrects and not x.is_embedding, pivoted=pivoted) for x in layers]
        reason = "worth its parameters" if len(self.ranks) > 1 else "too small: no rank saves parameters"
        if storage_format.scheme is not None:
            reason = "chosen whole by the solver"
        return [layer.dense(reason) for layer in self.layers]

    def quantized_at(self, point: int, calibrated: Container[str]) -> list[QuantizedWeight]:
        """Return what is quantized at ``point``; ``calibrated`` are the layers with statistics."""
        layers, storage_format = self.layers_at(point), self.formats[point]
        return [
            stored
            for layer in layers
            for stored in storage_format.quantized(
                layer, shared=len(layers) > 1, calibrated=layer.name in calibrated
            )
        ]

    def without_whole(self) -> Candidates:
        """Return the factors only: of a format that the whole weight cannot have."""
        costs, losses, ranks = (values[:-1] for values in (self.costs, self.losses, self.ranks))
        return replace(self, costs=costs, losses=losses, ranks=ranks, formats=self.formats[:-1])

    def priced(self, costs: np.ndarray[Any, Any]) -> Candidates:
        """Return the list of candidates with other costs, less what another point beats."""
        return merged([replace(self, costs=costs)])


def merged(candidates: Sequence[Candidates]) -> Candidates:
    """Return the candidates of all lists, which are of the same layers, but for those that another beats."""
    costs, losses, ranks = (
        np.concatenate([getattr(candidate_list, part) for candidate_list in candidates])
        for part in ("costs", "losses", "ranks")
    )
    formats = [storage_format for candidate_list in candidates for storage_format in candidate_list.formats]
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(np.append(np.inf, losses[order]))[:-1]
    kept = order[losses[order] < best]
    return replace(
        candidates[0],
        costs=costs[kept],
        losses=losses[kept],
        ranks=ranks[kept],
        formats=tuple(formats[i] for i in kept),
    )


def sharing(layers: Sequence[LayerPlan], rank: int, reason: str) -> list[LayerPlan]:
    """Give ``layers`` a rank and, if they are several, one ``down``, which the first of them owns."""
    owner, alone = layers[0].name, len(layers) == 1
    return [
        replace(
            *(layer,),
            rank=rank,
            reason=reason,
            shares_down_with=owner if number else None,
            pivoted=layer.pivoted and alone,
        )
        for number, layer in enumerate(layers)
    ]


class QuantizationLoss(NamedTuple):
    """What a storage format does to one layer, as shares of squared norms; nothing where it is floating
    point.

    Args:
        whole: What the quantized weight loses.
        factors: What quantized factors lose of what they capture.
        corrected: The errors of factors that correct the quantized weight, for a correction.
    """

    whole: float = 0.0
    factors: float = 0.0
    corrected: ErrorCurve | None = None


def candidates_of(
    layers: Sequence[LayerPlan],
    error_curves: Sequence[ErrorCurve],
    scales: Sequence[float],
    round_to: int,
    storage_format: StorageFormat = FLOAT,
    quantization_losses: Sequence[QuantizationLoss] = (),
) -> Candidates:
    """List the ranks that save parameters, for one layer or for several with one ``down``.

    Args:
        layers: The layers.
        error_curves: The error of each, at every rank of their factorization.
        scales: Factor from the squared error of each to the loss.
        round_to: Ranks are multiples of this, and of what the storage format needs.
        storage_format: How all of them are stored.
        quantization_losses: What that does to each.
    """
    step = math.lcm(round_to, storage_format.rank_step)
    ranks = np.arange(step, largest_shared_rank(layers) + 1, step)
    if storage_format.pivoted:
        (layer,) = layers
        ranks = np.arange(step, min(layer.in_features, layer.out_features), step)
    if storage_format.only_rank is not None:
        ranks = np.array([storage_format.only_rank])
    losses = np.zeros(len(ranks) + 1)
    for each, scale, quantization_loss in zip(
        error_curves, scales, quantization_losses or [QuantizationLoss()] * len(layers), strict=True
    ):
        errors = quantization_loss.corrected or each
        if errors is not each and each.squared_norm > 0:
            errors = errors.with_ratios(torch.tensor(each.expected_norm / each.squared_norm))
        expected = errors.expected.numpy()
        captured = (expected[0] - expected[ranks]).clip(min=0)
        losses[:-1] += (expected[ranks] + quantization_loss.factors * captured) * errors.scale**2 * scale
        losses[-1] += quantization_loss.whole * each.expected_norm * scale
    dense = sum(layer.dense_parameters for layer in layers)
    found = Candidates(
        costs=np.append([_parameters_at(layers, rank, storage_format) for rank in ranks.tolist()], dense),
        losses=losses,
        layers=tuple(layers),
        ranks=np.append(ranks, 0),
        formats=(storage_format,) * len(losses),
    )
    return found if storage_format.only_rank is None else found.without_whole()


def _parameters_at(layers: Sequence[LayerPlan], rank: int, storage_format: StorageFormat) -> int:
    if storage_format.pivoted:
        return replace(layers[0], pivoted=True).parameters_at(rank)
    return rank * parameters_per_shared_rank(layers)


def partitions(
    names: tuple[str, ...], candidates: Mapping[tuple[str, ...], Candidates]
) -> Iterator[tuple[Candidates, ...]]:
    """Yield every way to divide layers into those that share ``down`` and those that do not.

    Args:
        names: The layers.
        candidates: The list of candidates of each layer, and of those that may share, by the names of its
            layers.
    """
    if not names:
        yield ()
    for part, candidate_list in candidates.items():
        if part[:1] == names[:1] and set(part) <= set(names):
            rest = tuple(name for name in names if name not in part)
            yield from ((candidate_list, *others) for others in partitions(rest, candidates))


def best_partitions(groups: Sequence[Sequence[tuple[Offer, ...]]], limit: float) -> list[Offer]:
    """Choose for each group, given all its partitions, the one that loses least within ``limit``.

    A Lagrangian sees only the lower convex hull of a partition's combinations. So it is the hulls that
    compete here; which ranks it will be within the chosen partition is left to a second allocation.
    """
    curves, origins = [], []
    for choices in groups:
        points = [(*point, parts) for parts in choices for point in _hull_of_sums(parts)]
        points.sort(key=lambda point: point[:2])
        kept = points[:1]
        for point in points[1:]:
            if point[1] < kept[-1][1]:
                kept.append(point)
        curves.append(Curve(np.array([point[0] for point in kept]), np.array([point[1] for point in kept])))
        origins.append([point[2] for point in kept])
    chosen = allocate(curves, limit)
    return [
        candidate_list
        for parts, number in zip(origins, chosen, strict=True)
        for candidate_list in parts[number]
    ]


def _hull_of_sums(candidates: Sequence[Offer]) -> Iterator[tuple[float, float]]:
    """Yield cost and loss along the lower convex hull of all combinations."""
    at = [0] * len(candidates)
    steps = [
        (slope, i, stop)
        for i, candidate_list in enumerate(candidates)
        for slope, _, stop in hull_segments(candidate_list)
    ]
    for _, number, stop in [(0.0, 0, 0), *sorted(steps, key=lambda step: -step[0])]:
        at[number] = stop
        chosen = list(zip(candidates, at, strict=True))
        yield (
            sum(float(candidate_list.costs[i]) for candidate_list, i in chosen),
            sum(float(candidate_list.losses[i]) for candidate_list, i in chosen),
        )

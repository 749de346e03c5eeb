"""Choose how many neurons each feed-forward block keeps: error curves and one budget become a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lowrank.allocation.candidates import Offer
from lowrank.allocation.selection import rank_step
from lowrank.allocation.solver import allocate, uniform
from lowrank.calibration.statistics import Stats
from lowrank.config import CompressionConfig
from lowrank.errors import BudgetError, TargetError, WeightError
from lowrank.inspection.feed_forward import FeedForward, feed_forward_blocks
from lowrank.inspection.inspection import Inspection
from lowrank.linalg import ErrorCurve
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.neurons import neuron_removal
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.patterns import is_wildcard
from lowrank.plans.plan import Plan
from lowrank.plans.storage_formats import FLOAT, StorageFormat
from lowrank.surgery.factorization import importance, metric_of, weight_of


@dataclass(frozen=True)
class Widths(Offer):
    """The widths that one block can have; the last point leaves it as it is.

    Args:
        reader: The layer that reads the hidden features.
        writers: The layers that write them.
        widths: Of each point.
        errors: The reader's error at every width.
        loss_per_square: Factor from that to the loss, if there is one.
    """

    reader: LayerPlan
    writers: tuple[LayerPlan, ...]
    widths: np.ndarray[Any, Any]
    errors: ErrorCurve
    loss_per_square: float | None

    @property
    def layers(self) -> tuple[LayerPlan, ...]:  # type: ignore[override]
        """The layers of the block."""
        return (self.reader, *self.writers)

    @property
    def ranks(self) -> np.ndarray[Any, Any]:  # type: ignore[override]
        """Zeros: nothing is factorized."""
        return np.zeros(len(self.widths), dtype=int)

    @property
    def formats(self) -> tuple[StorageFormat, ...]:  # type: ignore[override]
        """Floating point, of each point."""
        return (FLOAT,) * len(self.widths)

    def quantized_at(self, point: int, calibrated: Container[str]) -> list[QuantizedWeight]:
        """Return nothing."""
        return []

    def priced(self, costs: np.ndarray[Any, Any]) -> Widths:
        """Return the same widths with other costs."""
        return replace(self, costs=costs)

    def layers_at(self, point: int) -> list[LayerPlan]:
        """Return the layers as they are at ``point``."""
        width = int(self.widths[point])
        if width == self.reader.in_features:
            return [layer.dense("worth its parameters") for layer in (self.reader, *self.writers)]
        chosen = "width chosen by the solver"
        loss, squared = self.loss_per_square, self.errors.expected_squared_error(width)
        norm = self.errors.expected_norm
        held_out = self.errors.held_out is not None and norm > 0
        reader = replace(
            self.reader,
            kept_inputs=width,
            reason=chosen,
            relative_error=self.errors.relative_error(width),
            held_out_error=math.sqrt(squared / norm) if held_out else None,
            loss_increase=None if loss is None else loss * squared,
        )
        writers = (replace(x, kept_outputs=width, feeds=reader.name, reason=chosen) for x in self.writers)
        return [reader, *writers]


def decide_widths(
    seen: Inspection,
    drafted: Plan,
    config: CompressionConfig,
    stats: Stats | None,
    run: Callable[[], object],
    progress: bool,
) -> Plan:
    """Give every feed-forward block of targeted layers a width; all other layers stay as they are.

    Args:
        seen: The model.
        drafted: Its layers, from `lowrank.allocation.planner.drafted`.
        config: What the user asked for: ``keep`` counts the weights of the blocks.
        stats: Calibration statistics, unless the metric is ``"weight"``.
        run: Calls the model on data, so that its blocks are seen.
        progress: Show a progress bar on a terminal.

    Raises:
        BudgetError: If there is no block, or ``keep`` is too small for any width.
        TargetError: If a layer that a target names without wildcards is in no block.
    """
    curves, reasons = widths_of(seen, drafted, config, stats, run, progress)
    left = {layer.name: reasons[layer.name] for layer in drafted.targeted if layer.name in reasons}
    for name in left:
        if any(pattern == name and not is_wildcard(pattern) for pattern in config.targets or ()):
            raise TargetError(f"{name}: cannot lose neurons: it {left[name]}. Take it out of targets.")
    alone = {n: replace(drafted[n], targeted=False, reason=reason) for n, reason in left.items()}
    drafted = drafted.with_layers(alone)
    if not curves:
        said = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:4]]
        raise BudgetError("\n".join([f"No layer of {drafted.model} can lose neurons.", *said]))
    layers = [layer for one, point in _chosen(curves, config) for layer in one.layers_at(point)]
    return replace(
        drafted,
        budget=str(config.budget),
        allocation=config.allocation,
        round_to=config.round_to,
        tolerance=config.tolerance,
    ).with_layers({layer.name: layer for layer in layers})


def widths_of(
    seen: Inspection,
    drafted: Plan,
    config: CompressionConfig,
    stats: Stats | None,
    run: Callable[[], object],
    progress: bool,
) -> tuple[list[Widths], dict[str, str]]:
    """Return what each feed-forward block of targeted layers can become; see `decide_widths`.

    Returns:
        The widths of each block, and by name why other layers cannot lose neurons.
    """
    blocks, reasons = feed_forward_blocks(seen, run, _ineligible(drafted, stats))
    bar = tqdm(blocks, desc="error curves", unit="block", disable=None if progress else True)
    return [_widths(seen, drafted, block, config, stats) for block in bar], reasons


def _ineligible(drafted: Plan, stats: Stats | None) -> dict[str, str]:
    """Return why layers cannot be in a block, whatever the model computes."""
    found = {layer.name: layer.reason for layer in drafted if not layer.targeted}
    if stats is None or drafted.metric not in ("inputs", "loss"):
        return found
    for layer in drafted.targeted:
        if not layer.is_embedding and stats.moments(layer.name).products.ndim == 1:
            found[layer.name] = "is so wide that only diagonals of its moments are known"
    return found


@without_autocast()
def _widths(
    seen: Inspection, drafted: Plan, block: FeedForward, config: CompressionConfig, stats: Stats | None
) -> Widths:
    """Return what one block can become."""
    reader, *writers = (replace(drafted[name], added_bias=False) for name in (block.reader, *block.writers))
    metric = metric_of(reader, drafted.metric, stats)
    try:
        errors = neuron_removal(weight_of(seen.model.get_submodule(reader.name)).detach(), metric).errors
    except WeightError as error:
        raise type(error)(f"{reader.name}: {error}") from error
    known = stats.loss_per_square(reader.name) if stats is not None and drafted.metric == "loss" else None
    if stats is not None and drafted.metric == stats.best_metric() and reader.name in stats.held_out:
        errors = errors.with_ratios(_ratios(errors, stats, reader.name))
    hidden = reader.in_features
    step = rank_step(config)
    widths = np.append(np.arange(step, hidden, step), hidden)
    counts = errors.scale**2 * importance(reader, errors.squared_norm, known)
    return Widths(
        costs=widths * (reader.out_features + sum(writer.in_features for writer in writers)),
        losses=errors.expected.numpy()[widths] * counts,
        reader=reader,
        writers=tuple(writers),
        widths=widths,
        errors=errors,
        loss_per_square=known,
    )


def _ratios(errors: ErrorCurve, stats: Stats, reader: str) -> Tensor:
    """Return by how much the errors of every width grow on held-out tokens.

    There have been trials of factors only. Neurons are taken to fare like the factors with the same error.
    """
    predicted, ratios = stats.held_out[reader].predicted, stats.held_out_ratios(reader)
    if not errors.tail[0] > 0 or not predicted[0] > 0:
        return torch.ones_like(errors.tail)
    alike = (predicted / predicted[0]).flip(0).numpy(), ratios.flip(0).numpy()
    return torch.from_numpy(np.interp((errors.tail / errors.tail[0]).numpy(), *alike))


def _chosen(curves: Sequence[Widths], config: CompressionConfig) -> list[tuple[Widths, int]]:
    keep = config.budget.value
    limit = keep * sum(float(curve.costs[-1]) for curve in curves)
    least = sum(float(curve.costs[0]) for curve in curves)
    if least > limit:
        raise BudgetError(
            f"{config.budget}: blocks of {config.round_to} neurons each keep {least / limit * keep:.3f} of "
            "the parameters. Keep more, or let widths be multiples of less, round_to=."
        )
    points = uniform(curves, limit) if config.allocation == "uniform" else allocate(curves, limit)
    return list(zip(curves, points, strict=True))

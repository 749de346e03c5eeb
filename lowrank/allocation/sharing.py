"""Which layers may share their first factor: readers of one input, or one role in adjacent blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lowrank.allocation.candidates import Group
from lowrank.calibration.statistics import Stats
from lowrank.config import Budget
from lowrank.errors import BudgetError, WeightError
from lowrank.inspection.blocks import find_blocks
from lowrank.linalg import ErrorCurve
from lowrank.linalg.matmul import without_autocast
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan
from lowrank.surgery.factorization import joint_errors, weight_of

SIZES = (2, 4)
"""How many adjacent blocks share a basis where the solver chooses: few enough to try all."""


@without_autocast()
def groups_of(
    model: nn.Module,
    drafted: Plan,
    share: str | None,
    share_size: int | None,
    budget: Budget,
    stats: Stats | None,
    predict: bool,
) -> list[Group]:
    """Find the targeted layers that may share ``down``; with ``predict`` measure joint factors for them.

    Args:
        model: Gives the weights.
        drafted: The layers.
        share: ``"inputs"``, ``"layers"``, or nothing.
        share_size: Blocks that share a basis; ``None`` for 2 or 4, as the solver chooses (at given ranks,
            2).
        budget: A bound on errors must hold for every layer, so errors are then bounds and not estimates.
        stats: Tell what reads the same input, and measure errors.
        predict: Whether errors are wanted.

    Raises:
        BudgetError: If nothing can tell which layers these are, there are none, or the budget is a latency.
    """
    if share is None:
        return []
    if budget.name == "speedup":
        raise BudgetError(f'share="{share}" has no latencies to choose by. Give another budget than speedup.')
    chains: Iterable[Sequence[LayerPlan]]
    if share == "inputs":
        chains = _readers(model, drafted, stats)
    else:
        sizes = SIZES[:1] if budget.name == "rank" else SIZES
        sizes = sizes if share_size is None else (share_size,)
        chains = _adjacent(model, drafted, sizes[-1])
    groups = []
    for layers in chains:
        sets = _sets_of_readers(layers) if share == "inputs" else _runs(layers, sizes)
        joint = {}
        for some in sets if predict else [layers]:
            names = tuple(layer.name for layer in some)
            estimate = budget.name not in ("error", "energy")
            joint[names] = _errors(model, some, drafted.metric, stats, estimate) if predict else ()
        groups.append(Group(tuple(layer.name for layer in layers), joint))
    return groups


def _errors(
    model: nn.Module, layers: Sequence[LayerPlan], metric: str, stats: Stats | None, estimate: bool
) -> tuple[ErrorCurve, ...]:
    weights = [weight_of(model.get_submodule(layer.name)) for layer in layers]
    try:
        return joint_errors(layers, weights, metric, stats, estimate)
    except WeightError as error:
        raise WeightError(f"{layers[0].name} or a layer beside it: {error}") from error


def _alike(model: nn.Module, layer: LayerPlan) -> tuple[object, ...]:
    """Return what must be equal in layers that share ``down``, beside what they read."""
    weight: Tensor = model.get_submodule(layer.name).weight  # type: ignore[assignment]
    return layer.has_bias, layer.in_features, weight.dtype, weight.device


def _readers(model: nn.Module, drafted: Plan, stats: Stats | None) -> Iterator[Sequence[LayerPlan]]:
    """Yield the layers that read the same tensor."""
    if stats is None:
        raise BudgetError(
            'share="inputs" finds the layers that read the same input by calibration: pass data=, or '
            "stats=calibrate(model, data)."
        )
    readers: dict[object, list[LayerPlan]] = {}
    for layer in drafted.targeted:
        if layer.name in stats.sources:
            readers.setdefault((stats.sources[layer.name], *_alike(model, layer)), []).append(layer)
    yield from (layers for layers in readers.values() if len(layers) > 1)


def _sets_of_readers(layers: Sequence[LayerPlan]) -> Iterator[Sequence[LayerPlan]]:
    """Yield the sets of layers that may share a factor: all of them, and any two of three."""
    if len(layers) == 3:
        yield from itertools.combinations(layers, 2)
    yield layers


def _adjacent(model: nn.Module, drafted: Plan, size: int) -> list[Sequence[LayerPlan]]:
    """Return the layers of one role in adjacent blocks, ``size`` at a time from the first block on.

    A role is the name within the block. Where it has another kind, shape, bias, dtype or device than in
    the block before, it begins anew.

    Raises:
        BudgetError: If there are none, or a group wants more blocks than there are.
    """
    blocks = list(find_blocks(model))
    if size > max(len(blocks), max(SIZES)):
        raise BudgetError(f"share_size={size}: {drafted.model} has {len(blocks)} repeated blocks.")
    roles: dict[object, list[tuple[int, LayerPlan]]] = {}
    for layer in (layer for layer in drafted.targeted if not layer.is_embedding):
        for number, block in enumerate(blocks):
            if layer.name.startswith(f"{block}."):
                role = (
                    layer.name.removeprefix(block),
                    layer.layer_type,
                    layer.out_features,
                    *_alike(model, layer),
                )
                roles.setdefault(role, []).append((number, replace(layer, same_input=False)))
    found: list[Sequence[LayerPlan]] = []
    for members in roles.values():
        for _, run in itertools.groupby(enumerate(members), lambda item: item[1][0] - item[0]):
            found += _pieces([layer for _, (_, layer) in run], size)
    if not found:
        raise BudgetError(
            f'share="layers": of the {len(blocks)} repeated blocks in {drafted.model} no two adjacent ones '
            "have targeted layers of one name and shape. Leave out share, or target more layers."
        )
    return found


def _runs(layers: Sequence[LayerPlan], sizes: Sequence[int]) -> Iterator[Sequence[LayerPlan]]:
    """Yield the runs of adjacent layers that may share, each once."""
    runs = (run for size in sizes for run in _pieces(layers, size))
    yield from {tuple(layer.name for layer in run): run for run in runs}.values()


def _pieces(layers: Sequence[LayerPlan], size: int) -> list[Sequence[LayerPlan]]:
    """Cut ``layers`` into pieces of ``size``; a last one that is shorter counts if it has two."""
    pieces = (layers[start : start + size] for start in range(0, len(layers), size))
    return [piece for piece in pieces if len(piece) > 1]

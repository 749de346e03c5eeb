"""Pictures of a plan: each layer's rank, and how fast its error falls. Needs ``torch-lowrank[plot]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank import arguments
from lowrank.arguments import accepts, instance, optional
from lowrank.errors import LowRankError
from lowrank.files.atomic_file import replaced
from lowrank.linalg import ErrorCurve
from lowrank.plans.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@accepts(plan=instance(Plan, "a Plan, from plan(model, ...)"), path=optional(arguments.path()))
def plot_ranks(plan: Plan, path: str | Path | None = None) -> Figure:
    """Draw how much of each targeted layer remains, with its rank.

    Args:
        plan: From `lowrank.plan`.
        path: Where to write the picture; the ending gives the format. ``None`` writes nothing.

    Returns:
        The figure.

    Raises:
        LowRankError: If matplotlib is not installed, or does not know the format.
        CheckpointError: If the picture cannot be written.
    """
    figure, axes = _figure(height=1.5 + 0.18 * len(plan.targeted))
    layers = plan.targeted
    bars = axes.barh(range(len(layers)), [100 * layer.kept_fraction for layer in layers])
    axes.bar_label(bars, ["dense" if x.rank is None else str(x.rank) for x in layers], size=6, padding=2)
    axes.set_xlim(0, 112)  # room for the labels
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], size=6)
    axes.invert_yaxis()
    axes.set_xlabel("parameters that remain (%), and rank")
    axes.set_title(f"{plan.model}, {plan.budget}: {plan.kept_fraction:.1%} remain", size=9)
    return _written(figure, path)


@accepts(
    error_curves=instance(Mapping, "what lowrank.error_curves(model) returns"),
    plan=optional(instance(Plan, "a Plan, from plan(model, ...)")),
    path=optional(arguments.path()),
)
def plot_error_curves(
    error_curves: Mapping[str, ErrorCurve], plan: Plan | None = None, path: str | Path | None = None
) -> Figure:
    """Draw each layer's relative error against its rank, coloured by role; a plan's ranks are marked.

    Args:
        error_curves: By layer name, from `lowrank.error_curves`.
        plan: Marks its ranks on the curves.
        path: Where to write the picture. ``None`` writes nothing.

    Returns:
        The figure.

    Raises:
        LowRankError: If matplotlib is not installed, or does not know the format.
        CheckpointError: If the picture cannot be written.
    """
    figure, axes = _figure(height=4.5)
    roles = list(dict.fromkeys(map(_role, error_curves)))
    for name, error_curve in error_curves.items():
        errors = (error_curve.tail / error_curve.tail[0].clamp(min=1e-300)).sqrt().numpy()
        color = f"C{roles.index(_role(name)) % 10}"
        (line,) = axes.plot(errors, color=color, linewidth=0.8, alpha=0.7)
        line.set_label(_role(name) if _role(name) not in axes.get_legend_handles_labels()[1] else None)
        rank = plan[name].rank if plan is not None and name in plan else None
        if rank is not None:
            axes.plot(rank, errors[rank], "o", color=line.get_color(), markersize=3)
    axes.set_xlabel("rank")
    axes.set_ylabel("relative error ‖W − LR‖ / ‖W‖")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=6)
    return _written(figure, path)


def _role(name: str) -> str:
    """Name what layers of different blocks have in common: ``encoder.layer.*.output.dense``."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _figure(height: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LowRankError("Plots need matplotlib: pip install 'torch-lowrank[plot]'.") from error
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        try:
            with replaced(Path(path)) as new:
                figure.savefig(new, dpi=150)
        except ValueError as error:  # matplotlib does not know the format
            raise LowRankError(f"path={str(path)!r}: the picture cannot be written: {error}") from error
    return figure

"""How many of a model's parameters a plan can change, and why the rest stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank.plans.formatting import format_table

LISTED = 0.01
"""Share of the model's parameters above which a tensor is listed by itself."""


@dataclass(frozen=True)
class UnplannedWeight:
    """Parameters that belong to no layer of a plan: one tensor, or several small ones with one reason.

    Args:
        name: Of the tensor; of the first of several.
        shape: Of that tensor.
        parameters: Elements, of all of them.
        reason: Why no layer of the plan has it: ``"convolution (Conv2d)"``.
        tensors: How many these are. One with more than a hundredth of the model's parameters is alone.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    reason: str
    tensors: int = 1


def describe_reach(model: str, total: int, reachable: int, unplanned: Sequence[UnplannedWeight]) -> str:
    """Say how much of a model can change, what the rest is, and which large tensors are among that.

    Args:
        model: Its class name.
        total: Its parameters.
        reachable: Those in layers that may change.
        unplanned: Those in no layer; what remains is in layers that stay as they are.
    """
    share = reachable / max(1, total)
    lines = [f"{model}: {share:.1%} of {total:,} parameters are in layers that can change."]
    lines += shares(total, reachable, unplanned)
    large = [weight for weight in unplanned if weight.parameters > LISTED * total and weight.tensors == 1]
    if large:
        header = ("weight that stays", "shape", "share", "reason")
        rows = [(x.name, "×".join(map(str, x.shape)), f"{x.parameters / total:.1%}", x.reason) for x in large]
        lines += ["", format_table(header, rows)]
    return "\n".join(lines)


def describe_small_reach(model: str, total: int, reachable: int, unplanned: Sequence[UnplannedWeight]) -> str:
    """Say that little of a model can change, what most of the rest is, and what to do about it.

    The arguments are those of `describe_reach`.
    """
    rest = shares(total, reachable, unplanned)
    return (
        f"{model}: only {reachable / max(1, total):.1%} of {total:,} parameters are in layers that can "
        "change."
        f" The largest part of the rest: {rest[0].strip()}. print(plan(model, ...)) lists what stays; "
        "targets=['*'] says that you know."
    )


def shares(total: int, reachable: int, unplanned: Sequence[UnplannedWeight]) -> list[str]:
    """Return a line for each reason why parameters stay as they are, the largest share first."""
    counts: dict[str, int] = {}
    for weight in unplanned:
        counts[weight.reason] = counts.get(weight.reason, 0) + weight.parameters
    counts["linear layers that stay; each has its reason"] = total - reachable - sum(counts.values())
    found = sorted(counts.items(), key=lambda item: -item[1])
    return [f"  {count / total:6.1%}  {reason}" for reason, count in found if count > 0]

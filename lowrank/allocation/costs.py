"""What a choice of ranks and storage formats costs, in the unit of a budget: parameters, bytes or seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowrank.allocation.candidates import Candidates


@dataclass(frozen=True)
class Costs:
    """What layers cost in a unit other than parameters.

    Args:
        limit: What the whole model may cost.
        fixed: What everything but the targeted weights costs.
        price: Returns a list of candidates with its costs in this unit.
        say: Puts a cost into words.
    """

    limit: float
    fixed: float
    price: Callable[[Candidates], Candidates]
    say: Callable[[float], str]

"""What a choice of ranks and storage formats costs, in the unit of a budget: parameters, bytes or seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank.allocation.candidates import Offer


@dataclass(frozen=True)
class Costs:
    """What layers cost in a unit other than parameters.

    Args:
        limit: What the whole model may cost.
        fixed: What everything but the targeted weights costs.
        price: Returns the cost of each choice in this unit.
        say: Puts a cost into words.
    """

    limit: float
    fixed: float
    price: Callable[[Offer], np.ndarray[Any, Any]]
    say: Callable[[float], str]

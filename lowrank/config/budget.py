"""How much of a model may remain: one number, in one of six units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.arguments import is_real, is_whole
from lowrank.errors import BudgetError, RankError

_MEANINGS = {
    "keep": "the fraction of the targeted weights' parameters that remains",
    "energy": "the fraction of each weight's squared norm that is retained",
    "error": "the largest relative error of each weight",
}
"""The budgets that are fractions, strictly between 0 and 1."""


def check_rank(rank: Any, where: str = "rank") -> int:
    """Return ``rank`` if it is a positive integer.

    Raises:
        RankError: If it is not a whole number (a ``bool`` is not), or below 1.
    """
    if not is_whole(rank):
        raise RankError(f"{where}: a rank is a whole number, not {rank!r} ({type(rank).__name__}).")
    if rank < 1:
        raise RankError(f"{where}: {rank} is not positive. The smallest rank is 1.")
    return int(rank)


@dataclass(frozen=True)
class Budget:
    """How much may remain, in one of six units.

    Args:
        name: The unit. ``"rank"``: an int for every layer, or a mapping of name pattern to int. ``"keep"``:
            the fraction of the targeted weights' parameters that remain. ``"energy"``: the fraction of each
            layer's squared norm to retain. ``"error"``: the largest relative error per layer.
            ``"max_bytes"``: the whole model's parameters and buffers. ``"speedup"``: the dense model's
            latency over the compressed one's.
        value: The number, or the mapping of a ``rank``.

    Raises:
        BudgetError: If there is no such unit, or the value is out of its range.
        RankError: If a rank is not a positive integer.
    """

    name: str
    value: Any

    NAMES = ("rank", "keep", "energy", "error", "max_bytes", "speedup")

    def __post_init__(self) -> None:
        if self.name not in self.NAMES:
            raise BudgetError(f"Unknown budget {self.name!r}. Give one of: {', '.join(self.NAMES)}.")
        check = {"rank": _ranks, "max_bytes": _bytes, "speedup": _speedup}.get(self.name, self._fraction)
        object.__setattr__(self, "value", check(self.value))

    def _fraction(self, value: Any) -> float:
        if not is_real(value) or not 0 < value < 1:
            raise BudgetError(
                f"{self.name}={value!r}: {self.name} is {_MEANINGS[self.name]}, a number strictly between 0 "
                "and 1."
            )
        return float(value)

    @classmethod
    def of(cls, **options: Any) -> Budget:
        """Make the budget from keyword arguments of which exactly one is not ``None``.

        Raises:
            BudgetError: If none or several are given, or the value is out of range.
            RankError: If a rank is not a positive integer.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) != 1:
            got = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            raise BudgetError(f"Give exactly one budget of {', '.join(cls.NAMES)}; got {got}.")
        ((name, value),) = given.items()
        return cls(name, value)

    @property
    def bounds_errors(self) -> bool:
        """Whether it is a bound on every layer's error."""
        return self.name in ("error", "energy")

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}"


def _ranks(value: Any) -> int | dict[str, int]:
    if not isinstance(value, Mapping):
        return check_rank(value)
    if not value:
        raise BudgetError("rank={}: the mapping is empty. Map name patterns to ranks: {'*.query': 64}.")
    for pattern in value:
        if not isinstance(pattern, str):
            raise BudgetError(f"rank={{{pattern!r}: …}}: a key is a name pattern, such as '*.query'.")
    return {pattern: check_rank(rank, where=pattern) for pattern, rank in value.items()}


def _bytes(value: Any) -> int:
    if not is_whole(value) or value < 1:
        raise BudgetError(
            f"max_bytes={value!r}: give the bytes that the whole model may take, a whole number."
        )
    return int(value)


def _speedup(value: Any) -> float:
    if not is_real(value) or not value > 1:
        raise BudgetError(f"speedup={value!r}: give the dense latency over the compressed one, above 1.")
    return float(value)

"""Every attack there is, in the order of the table: a new one is added to this list and nowhere else."""

from __future__ import annotations

from harness import Attack
from kills import KILLS
from odd_data import ODD_DATA

ATTACKS: tuple[Attack, ...] = (KILLS, ODD_DATA)


def named(name: str) -> Attack:
    """Return the attack with this name."""
    return next(attack for attack in ATTACKS if attack.name == name)

"""Every attack there is, in the order of the table: a new one is added to this list and nowhere else."""

from __future__ import annotations

import mutations
from harness import Attack

ATTACKS: tuple[Attack, ...] = (
    Attack(
        "mutations",
        "Damage to each kind of file that is written (bytes, JSON, sizes, swaps, links), then loading it",
        mutations.attempt,
    ),
    Attack(
        "mutations-transformers",
        "The same of transformers folders with digests, through `lowrank.load` and `from_pretrained`",
        mutations.attempt_transformers,
    ),
)


def named(name: str) -> Attack:
    """Return the attack with this name."""
    return next(attack for attack in ATTACKS if attack.name == name)

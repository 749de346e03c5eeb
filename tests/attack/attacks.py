"""Every attack there is, in the order of the table: a new one is added to this list and nowhere else."""

from __future__ import annotations

import calls
import matrices
import mutations
from harness import Attack
from kills import KILLS
from odd_data import ODD_DATA

CALLS = Attack(
    "calls",
    "public calls in any order, with good and bad arguments, on small modules",
    calls.attempt,
    3.0,
)
MUTATIONS = Attack(
    "mutations",
    "damage to each kind of file that is written (bytes, JSON, sizes, swaps, links), then loading it",
    mutations.attempt,
)
HF_MUTATIONS = Attack(
    "hf-mutations",
    "the same of transformers folders with digests, through `lowrank.load` and `from_pretrained`",
    mutations.attempt_transformers,
)
MATRICES = Attack(
    "matrices",
    "weights and statistics of extreme sizes, ranks and shapes",
    matrices.attempt,
    0.5,
)

ATTACKS: tuple[Attack, ...] = (CALLS, MUTATIONS, HF_MUTATIONS, KILLS, ODD_DATA, MATRICES)


def named(name: str) -> Attack:
    """Return the attack with this name."""
    return next(attack for attack in ATTACKS if attack.name == name)

"""What every attack shares: random attempts, each from a seed of its own, counted by what came of them.

An attack is a function ``attempt(seed, folder)`` that tries one random thing and returns the name of what
happened, such as ``"refused"``; an attempt that covers several things returns a counter of outcomes. It
raises `Broken` where the library did something that it promises not to do. `run` repeats it for a while.
All that an attempt does follows from its seed, so that one can be repeated:

    python tests/attack/run.py --only NAME --attempt SEED
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Broken(AssertionError):  # noqa: N818
    """The library broke a promise: the message says which, and how to see it."""


class Hangs(BaseException):
    """An attempt took longer than its attack allows; no handler of the library catches it."""


@dataclass(frozen=True)
class Attack:
    """One kind of attempt.

    Args:
        name: One word, for the command line and the table.
        what: What is tried, as one sentence for the table in ``docs/reliability.md``.
        attempt: Called with a seed and an empty folder; returns what happened, or how often what happened.
        weight: Its share of the time that all attacks have together.
        seconds: How long one attempt may take before it counts as a hang.
    """

    name: str
    what: str
    attempt: Callable[[int, Path], str | Counter[str]]
    weight: float = 1.0
    seconds: float = 60.0


@dataclass
class Tally:
    """What came of the attempts: counts by outcome, and a text for each that was broken."""

    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """How many things were tried."""
        return self.outcomes.total()

    def add(self, other: Tally) -> None:
        """Add what another run has counted."""
        self.outcomes += other.outcomes
        self.broken += other.broken

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "tried": self.tried,
            "outcomes": dict(sorted(self.outcomes.items())),
            "broken": self.broken,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tally:
        """Read what `to_dict` has made."""
        return cls(Counter(data["outcomes"]), list(data["broken"]))


def run(
    attack: Attack,
    seed: int,
    *,
    seconds: float = float("inf"),
    tries: int | None = None,
    note: Callable[[int], None] = lambda seed: None,
) -> Tally:
    """Attempt again and again, until the time is over or as much was tried as was asked.

    Args:
        attack: What to attempt.
        seed: Every attempt's seed follows from this one and its number.
        seconds: When to stop; at least one attempt is made.
        tries: When to stop, by what was tried.
        note: Told each attempt's seed before the attempt, for a process that may crash.
    """
    tally, number, end = Tally(), 0, time.monotonic() + seconds
    while not number or (time.monotonic() < end and (tries is None or tally.tried < tries)):
        own = seed_of(attack.name, seed, number)
        note(own)
        tally.add(once(attack, own))
        number += 1
    return tally


def once(attack: Attack, seed: int) -> Tally:
    """Make one attempt in a folder of its own, which is removed."""
    folder = Path(tempfile.mkdtemp(prefix=f"attack-{attack.name}-"))
    try:
        with _limit(attack.seconds):
            found = attack.attempt(seed, folder)
    except (Exception, Hangs) as error:
        again = f"python tests/attack/run.py --only {attack.name} --attempt {seed}"
        what = str(error) if isinstance(error, Broken) else traceback.format_exc()
        kind = "hang" if isinstance(error, Hangs) else "broken"
        return Tally(Counter({kind: 1}), [f"{what}\nAgain: {again}"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Tally(Counter({found: 1}) if isinstance(found, str) else Counter(found))


def seed_of(name: str, seed: int, number: int) -> int:
    """Return the seed of one attempt: 48 bits, so that it is short to type."""
    return int.from_bytes(hashlib.sha256(f"{name} {seed} {number}".encode()).digest()[:6], "big")


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hangs(f"No end after {seconds:g} s.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

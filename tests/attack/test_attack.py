"""A few seconds of every attack, from a new seed in each run; the same with ``ATTACK_SEED=…``."""

import os
import secrets
from collections import Counter
from pathlib import Path

import pytest
from attacks import ATTACKS
from harness import Attack, Broken, Tally, once, run

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, about odd modules and hooks

SEED = int(os.environ.get("ATTACK_SEED", secrets.randbits(32)))
SECONDS = float(os.environ.get("ATTACK_SECONDS", 8))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_short_attack_breaks_no_promise(attack):
    print(f"ATTACK_SEED={SEED}")
    tally = run(attack, SEED, seconds=SECONDS)
    assert not tally.broken, f"ATTACK_SEED={SEED}\n\n" + "\n\n".join(tally.broken)
    assert tally.tried


def breaks(seed: int, folder: Path) -> str:
    raise Broken("Two and two are five.")


def hangs(seed: int, folder: Path) -> str:
    while True:
        pass


def test_a_broken_promise_is_counted_and_says_how_to_repeat_it():
    tally = once(Attack("example", "", breaks), 7)
    assert tally.outcomes == Counter(broken=1)
    assert tally.broken == [
        "Two and two are five.\nAgain: python tests/attack/run.py --only example --attempt 7"
    ]


def test_an_attempt_that_does_not_end_is_a_hang():
    tally = once(Attack("example", "", hangs, seconds=0.05), 7)
    assert tally.outcomes == Counter(hang=1)


def test_the_attempts_of_a_run_follow_from_its_seed():
    seen: list[int] = []

    def remember(seed: int, folder: Path) -> str:
        assert not list(folder.iterdir())
        seen.append(seed)
        return "done"

    runs = [run(Attack("example", "", remember), seed, tries=3) for seed in (1, 1, 2)]
    assert [tally.tried for tally in runs] == [3, 3, 3]
    assert seen[:3] == seen[3:6] != seen[6:]
    assert len(set(seen)) == 6


def test_tallies_add_up_and_survive_json():
    one, other = Tally(Counter(a=1), ["x"]), Tally(Counter(a=1, b=2), [])
    one.add(Tally.from_dict(other.to_dict()))
    assert one == Tally(Counter(a=2, b=2), ["x"])
    assert one.tried == 4

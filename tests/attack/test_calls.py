"""The calls as a state machine: hypothesis shortens what it finds to few calls with plain arguments."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from calls import KNOWN, STEPS, Step, take
from harness import Broken
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from session import Session
from zoo import ZOO

import lowrank

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, about odd modules and hooks

SEED = int(os.environ.get("ATTACK_SEED", secrets.randbits(32)))
RANDOM = st.randoms(use_true_random=False)


class Calls(RuleBasedStateMachine):
    """One module of the zoo, on which any of the steps may be taken at any time."""

    @initialize(name=st.sampled_from([name for name in ZOO if name not in KNOWN]))
    def begin(self, name):
        self.folder = Path(tempfile.mkdtemp(prefix="attack-calls-"))
        self.session = Session(ZOO[name], self.folder / "calls")

    def teardown(self):
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)


def rule_of(step: Step) -> Any:
    """Return the rule that takes ``step``, under its name."""

    def taken(self: Calls, random: Random) -> None:
        take(self.session, step, random)

    taken.__name__ = step.__name__
    return rule(random=RANDOM)(taken)


for _step, _ in STEPS:
    setattr(Calls, _step.__name__, rule_of(_step))


def hunt(examples: int, number: int = SEED) -> None:
    unhurried = settings(
        max_examples=examples,
        stateful_step_count=10,
        derandomize=False,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(Calls), settings=unhurried)


def test_no_sequence_of_calls_breaks_a_promise():
    print(f"ATTACK_SEED={SEED}")
    hunt(20)


def test_a_fault_is_found_and_shown_as_few_calls(monkeypatch):
    right = lowrank.decompress

    def wrong(model):
        right(model)
        next(iter(model.parameters())).data.add_(1)

    monkeypatch.setattr(lowrank, "decompress", wrong)
    with pytest.raises(Broken, match="moves the outputs") as caught:
        hunt(200, number=1)
    assert str(caught.value).count("\n  ") <= 3

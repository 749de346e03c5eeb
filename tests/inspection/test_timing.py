"""Times of calls: their median, without those that warm up, and with what the device has started."""

import pytest
import torch

from lowrank.inspection import timing
from lowrank.inspection.timing import WARM_UP, seconds_of, timed

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that moves only when a call moves it."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_a_call_takes_what_passes_meanwhile(clock):
    def call() -> None:
        clock[0] += 0.25

    assert timed(call, CPU) == 0.25


def test_the_median_of_all_calls_but_the_first_ones(clock):
    durations = iter([64.0] * WARM_UP + [1.0, 8.0, 2.0])

    def call() -> None:
        clock[0] += next(durations)

    assert seconds_of(call, 3, CPU) == 2.0
    assert next(durations, None) is None  # all calls were made


def test_what_a_device_has_started_is_waited_for(clock, monkeypatch):
    pending = [4.0]  # of work that was started before

    def synchronize(device: torch.device) -> None:
        clock[0] += pending[0]
        pending[0] = 0.0

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    assert timed(lambda: pending.__setitem__(0, 0.5), torch.device("cuda")) == 0.5

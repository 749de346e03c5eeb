"""Time a call on any device: the work that it has started there included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 2
"""Calls that do not count: the first ones allocate, and bring code and data into caches."""


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, until ``device`` has done all that it started."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the median seconds of ``repeats`` calls, after two that do not count."""
    times = [timed(call, device) for _ in range(repeats + WARM_UP)]
    return statistics.median(times[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

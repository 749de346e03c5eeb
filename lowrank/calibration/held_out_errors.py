"""What trials on held-out tokens have found, and what of it to expect of other data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_RATIO = 16.0
"""How far a measured cost may lie from the predicted one; beyond, a few tokens decide, and mislead."""

HELD_OUT_SUMS = ("measured", "joint", "predicted")
"""The tensors of `HeldOutErrors`."""


@dataclass(frozen=True, eq=False)
class HeldOutErrors:
    """Squared errors of trial factorizations at every rank, over tokens that these were not fitted to.

    Args:
        tokens: How many these were.
        samples: How many samples they were of.
        measured: The sum of the tokens' squares, shape ``(min(out, in) + 1,)``, float64.
        joint: The sum of the samples' squares, each of the sum of its tokens' errors.
        predicted: What the statistics of the other tokens made of ``measured``.
    """

    tokens: int
    samples: int
    measured: Tensor
    joint: Tensor
    predicted: Tensor

    def __post_init__(self) -> None:
        shapes = {getattr(self, name).shape for name in HELD_OUT_SUMS}
        if len(shapes) > 1 or self.measured.ndim != 1:
            raise ValueError(f"held-out errors of different sizes: {sorted(map(tuple, shapes))}")

    def means(self, coherence: float) -> Tensor:
        """Return the squared errors to expect of a token at every rank, shape ``(min(out, in) + 1,)``.

        Args:
            coherence: As many times more as tokens' errors add up to in a sample, from `coherences`.
        """
        return self.measured * (coherence / max(1, self.tokens))

    def ratios(self, coherence: float) -> Tensor:
        """Return the same over what was predicted, at every rank; 1 where nothing was predicted."""
        predicted = self.predicted / max(1, self.tokens)
        known = predicted > 0
        ratios = self.means(coherence) / torch.where(known, predicted, 1.0)
        return torch.where(known, ratios.clamp(1 / LARGEST_RATIO, LARGEST_RATIO), 1.0)

    def __add__(self, other: HeldOutErrors) -> HeldOutErrors:
        return HeldOutErrors(
            self.tokens + other.tokens,
            self.samples + other.samples,
            self.measured + other.measured,
            self.joint + other.joint,
            self.predicted + other.predicted,
        )


def coherences(held: Mapping[str, HeldOutErrors]) -> dict[str, float]:
    """Return by layer how many times the squares of the samples' errors are those of their tokens' errors.

    Errors that the tokens of a sample have in common add up before they are squared. A few samples say little
    of how much: the logarithm of a mean of n squared normal numbers lies ψ(n/2) − log(n/2) off on average,
    and varies by ψ'(n/2). So what a layer says counts beside what all of them say, and the more, the more the
    layers spread beyond that.

    Source: empirical Bayes (Efron & Morris 1973).
    """
    logs, noise = {}, {}
    for name, errors in held.items():
        middle = slice(len(errors.measured) // 8, len(errors.measured) // 2 + 1)
        tokens, samples = errors.measured[middle], errors.joint[middle]
        known = (tokens > 0) & (samples > 0)
        if errors.samples and bool(known.any()):
            half = torch.tensor(errors.samples / 2, dtype=torch.float64)
            logs[name] = float((samples[known] / tokens[known]).log().mean() - half.digamma() + half.log())
            noise[name] = float(torch.special.polygamma(1, half))
    if not logs:
        return dict.fromkeys(held, 1.0)
    mean = statistics.fmean(logs.values())
    spread = statistics.pvariance(logs.values(), mean) - statistics.fmean(noise.values())
    trusted = {name: max(0.0, spread) / (max(0.0, spread) + noise[name]) for name in logs}
    own = {name: math.exp(mean + trusted[name] * (log - mean)) for name, log in logs.items()}
    return {name: own.get(name, math.exp(mean)) for name in held}


def added(one: Mapping[str, HeldOutErrors], other: Mapping[str, HeldOutErrors]) -> dict[str, HeldOutErrors]:
    """Return the sums by name; a name that only one has keeps what it has."""
    return {**one, **other, **{name: one[name] + other[name] for name in one.keys() & other.keys()}}

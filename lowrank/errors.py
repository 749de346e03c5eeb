"""What can go wrong, as one family: every error of this library is a `LowRankError`.

A message says where (the layer or the file), what (with numbers), and what to do about it.
"""

from __future__ import annotations

import sys
import warnings


class LowRankError(Exception):
    """Base of every error that `lowrank` raises on purpose."""


class BudgetError(LowRankError):
    """The budget is malformed, or no choice of ranks meets it."""


class TargetError(LowRankError):
    """A pattern matches nothing, or names a layer that must stay as it is."""


class RankError(LowRankError):
    """A rank is not an integer, or lies outside ``1 .. min(out, in)``."""


class WeightError(LowRankError):
    """A weight cannot be factorized or quantized: NaN, infinite, integer, or without data."""


class SchemeError(WeightError):
    """Codes are of an unknown kind, or their groups do not divide a weight's rows."""


class SlowKernelWarning(UserWarning):
    """int4 weights of linear layers have no kernel on their device, and are dequantized at every call."""


class FewTokensWarning(UserWarning):
    """Calibration has seen too few tokens for the model's width, or one batch, which nothing is tried on."""


class ReachWarning(UserWarning):
    """Most of the model's parameters are in no layer that `lowrank.compress` can change."""


class PlanError(LowRankError):
    """A plan does not fit the model, or would not save anything."""


class CheckpointError(LowRankError):
    """A file is missing, damaged, foreign or from a newer version; or a file or folder cannot be written."""


class DataError(LowRankError):
    """Calibration data are missing, of the wrong kind, or refused by the model."""


class StatsError(LowRankError):
    """Statistics belong to another model, are damaged, or lack what a metric needs."""


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning that names the line outside of this library from which it was called."""
    level = 1
    while _is_own(sys._getframe(level).f_globals.get("__name__", "")) and sys._getframe(level).f_back:
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)


def _is_own(module: str) -> bool:
    return module.split(".")[0] == __name__.split(".")[0]

"""Every option of compression and of recovery, once: its type, default, choices, checks and help.

`compress`, `plan`, `recover`, the command line, `LowRankConfig` and the tables of the guide take them from
here. ``python -m lowrank.config`` prints the tables.
"""

from lowrank.config.budget import Budget, check_rank
from lowrank.config.compression import METRICS, CompressionConfig, CompressionOptions, PlanOptions
from lowrank.config.recovery import RecoveryConfig, RecoveryOptions
from lowrank.config.signatures import configured, documented

__all__ = [
    "METRICS",
    "Budget",
    "CompressionConfig",
    "CompressionOptions",
    "PlanOptions",
    "RecoveryConfig",
    "RecoveryOptions",
    "check_rank",
    "configured",
    "documented",
]

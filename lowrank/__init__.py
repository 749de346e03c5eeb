"""Make trained PyTorch models smaller and faster by low-rank factorization.

from lowrank import compress

compress(model, keep=0.5, data=texts, tokenizer=tokenizer)
"""

from typing import TYPE_CHECKING, Any

from lowrank import _transformers
from lowrank.allocation.latency import LatencyTable
from lowrank.calibration.statistics import Stats
from lowrank.checkpoint.checkpoint import load, save
from lowrank.config import CompressionConfig, RecoveryConfig
from lowrank.distillation.recovery import recover
from lowrank.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    FewTokensWarning,
    LowRankError,
    PlanError,
    RankError,
    ReachWarning,
    SchemeError,
    SlowKernelWarning,
    StatsError,
    TargetError,
    WeightError,
)
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedEmbedding, QuantizedLinear
from lowrank.pipeline.apply import apply, decompress
from lowrank.pipeline.calibrate import calibrate, error_curves
from lowrank.pipeline.compress import compress, plan
from lowrank.pipeline.quantize import quantize
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan
from lowrank.reports.benchmark import benchmark
from lowrank.reports.plots import plot_error_curves, plot_ranks
from lowrank.reports.report import report

if TYPE_CHECKING:
    from lowrank.hf import LowRankConfig

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "CompressionConfig",
    "DataError",
    "FewTokensWarning",
    "LatencyTable",
    "LayerPlan",
    "LowRankConfig",
    "LowRankEmbedding",
    "LowRankError",
    "LowRankLinear",
    "Plan",
    "PlanError",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RankError",
    "ReachWarning",
    "RecoveryConfig",
    "SchemeError",
    "SlowKernelWarning",
    "Stats",
    "StatsError",
    "TargetError",
    "WeightError",
    "apply",
    "benchmark",
    "calibrate",
    "compress",
    "decompress",
    "error_curves",
    "load",
    "plan",
    "plot_error_curves",
    "plot_ranks",
    "quantize",
    "recover",
    "report",
    "save",
]

_transformers.watch()


def __getattr__(name: str) -> Any:
    """Import transformers only when `LowRankConfig`, which needs it, is asked for."""
    if name == "LowRankConfig":
        from lowrank.hf import LowRankConfig

        return LowRankConfig
    raise AttributeError(f"module 'lowrank' has no attribute {name!r}")

"""Make trained PyTorch models smaller and faster by low-rank factorization.

from lowrank import compress

compress(model, keep=0.5, data=texts, tokenizer=tokenizer)
"""

from typing import TYPE_CHECKING, Any

from lowrank import _transformers
from lowrank.benchmarking import benchmark
from lowrank.checkpoint import load, save
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
from lowrank.latency import LatencyTable
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedEmbedding, QuantizedLinear
from lowrank.pipeline import apply, calibrate, compress, decompress, plan, quantize, spectra
from lowrank.planning import LayerPlan, Plan
from lowrank.plot import plot_ranks, plot_spectra
from lowrank.recovery import recover
from lowrank.reporting import report
from lowrank.statistics import Stats

if TYPE_CHECKING:
    from lowrank.hf import LowRankConfig

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
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
    "load",
    "plan",
    "plot_ranks",
    "plot_spectra",
    "quantize",
    "recover",
    "report",
    "save",
    "spectra",
]

_transformers.watch()


def __getattr__(name: str) -> Any:
    """Import transformers only when `LowRankConfig`, which needs it, is asked for."""
    if name == "LowRankConfig":
        from lowrank.hf import LowRankConfig

        return LowRankConfig
    raise AttributeError(f"module 'lowrank' has no attribute {name!r}")

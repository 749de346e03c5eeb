"""Plans without ranks for random weights, with their error curves; no model is needed."""

import torch

from lowrank.allocation.selection import select as select_ranks
from lowrank.config import CompressionConfig
from lowrank.linalg import error_curve
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan


def weight(rows: int, columns: int, decay: float = 0.5, seed: int = 0) -> torch.Tensor:
    """A random weight whose singular values fall off, the faster the larger ``decay``."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(rows, columns, generator=generator)
    return gaussian * torch.arange(1.0, columns + 1) ** -decay


def select(draft: Plan, budget: dict, error_curves: dict, **options: object) -> Plan:
    return select_ranks(draft, CompressionConfig(**budget, **options), error_curves)


def drafted(**weights: torch.Tensor) -> tuple[Plan, dict]:
    """A plan without ranks for these weights, and their error curves; no model is needed."""
    layers = tuple(LayerPlan(name, "linear", w.shape[1], w.shape[0], True) for name, w in weights.items())
    return Plan("Model", layers), {name: error_curve(w) for name, w in weights.items()}

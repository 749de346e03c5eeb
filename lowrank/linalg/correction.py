"""A quantized weight and the low-rank correction of what the codes lost: ``W ≈ Q + LR``.

For a given Q the optimum is the truncated factorization of ``W − Q`` under the metric; for given factors
Q quantizes ``W − LR``. The two alternate for a few rounds, and the best round counts: rounding makes no
promise to descend.

Source: LoftQ (Li et al. 2023, arXiv:2310.08659) for alternating, QERA (Zhang et al. 2024,
arXiv:2410.06040) for the optimum under the inputs' second moment, CALDERA (Saha et al. 2024,
arXiv:2405.18886) for both together with error feedback in Q.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.linalg.error_curve import ErrorCurve, error_curve
from lowrank.linalg.matmul import product
from lowrank.linalg.metric import Metric
from lowrank.linalg.quantization import dequantize_scaled, quantize_scaled
from lowrank.linalg.schemes import Scheme
from lowrank.linalg.svd import truncated_svd

ROUNDS = 2
"""How often Q and LR are made. The second round gains little on SmolLM2; more were not tried."""


class Corrected(NamedTuple):
    """``W ≈ scale · codes + left · right``."""

    codes: Tensor  # as `Scheme.shapes` says, of Q diag(s)⁻¹ where inputs are scaled
    scale: Tensor
    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)
    relative_error: float  # ‖W − Q − LR‖ / ‖W‖ under the metric


def quantize_with_correction(
    weight: Tensor,
    rank: int,
    scheme: Scheme,
    metric: Metric = Metric(),
    moments: Tensor | None = None,
    *,
    smooth_scale: Tensor | None = None,
    rounds: int = ROUNDS,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Corrected:
    """Code ``weight (out, in)``, and factor what is lost.

    Minimises ``‖G^½ (W − Q − LR) C^½‖`` over Q and LR in turn.

    Args:
        weight: Finite, floating point.
        rank: Inner size of the factors, ``1 <= rank <= min(out, in)``.
        scheme: How Q is quantized.
        metric: What the error measures; not one pulled back through the weight.
        moments: Second moment of the inputs for the rounding of Q; see `lowrank.linalg.quantize_weight`.
        smooth_scale: What the layer multiplies its inputs by before they meet the codes, ``(in,)``.
        rounds: How often both are made, at least once.
        tolerance: As for `lowrank.linalg.truncated_svd`.
        seed: The same.

    Raises:
        WeightError: If the weight is not a finite floating-point matrix, or not whole groups.
        RankError: If the rank is out of range.

    Example:
        >>> found = quantize_with_correction(torch.eye(32), 4, Scheme("int4"))
        >>> tuple(found.left.shape), found.relative_error < 0.01
        ((32, 4), True)
    """
    weight = weight.detach().float()
    best: Corrected | None = None
    low = torch.zeros_like(weight)
    norm = metric.squared_norm(weight)
    for _ in range(rounds):
        codes, scale = quantize_scaled(weight - low, scheme, smooth_scale, moments)
        lost = weight - dequantize_scaled(codes, scale, scheme, smooth_scale)
        left, right, *_ = truncated_svd(lost, rank, metric, tolerance=tolerance, seed=seed)
        low = product(left, right)
        error = math.sqrt(metric.squared_norm(lost - low) / norm) if norm > 0 else 0.0
        if best is None or error < best.relative_error:
            best = Corrected(codes, scale, left, right, error)
    assert best is not None
    return best


def correction_error_curve(weight: Tensor, lost: Tensor, metric: Metric = Metric()) -> ErrorCurve:
    """Return the errors at every rank of factors that correct a quantized weight, relative to ``‖W‖``.

    Args:
        weight: ``W (out, in)``.
        lost: ``W − Q``, as `lowrank.linalg.rounding_error_of` gives it.
        metric: As for `quantize_with_correction`, whose first round this predicts.
    """
    found = error_curve(lost, metric)
    return replace(found, whole=metric.squared_norm(weight) / found.scale / found.scale)

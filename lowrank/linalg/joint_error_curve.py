"""Joint factors: several weights that read the same input share one ``R``, ``Wᵢ ≈ Lᵢ R``.

That is one factorization of the weights stacked on each other, under a metric that is block-diagonal
on their outputs. With ``M = Hᵀ W S = U Σ Vᵀ`` of the stack (`lowrank.linalg.metric`), what is lost of
the i-th weight at rank k are its rows of ``M (I − V_k V_kᵀ)``, so that one decomposition gives each
weight's own error at every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.linalg.eigen import eigh
from lowrank.linalg.error_curve import ErrorCurve
from lowrank.linalg.metric import Metric, Side, Stacked
from lowrank.linalg.svd import checked_weight, rounding_of, small_side_gram


def joint_error_curves(weights: Sequence[Tensor], inputs: Side, outputs: Stacked) -> tuple[ErrorCurve, ...]:
    """Return the error of each weight at every rank of the joint factorization.

    Args:
        weights: Shapes ``(outᵢ, in)``, the sizes of ``outputs``.
        inputs: The metric of the input that all of them read.
        outputs: The metrics of their outputs.

    Returns:
        For each weight a `ErrorCurve` with ``min(Σ out, in) + 1`` errors, under its own metric: without
        the scale that it has in ``outputs``.

    Raises:
        WeightError: If a weight is not a finite floating-point matrix.
    """
    matrix, scale = checked_weight(torch.cat(list(weights)), plain=False)
    values, vectors = eigh(small_side_gram(matrix, Metric(inputs, outputs)))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if matrix.shape[0] <= matrix.shape[1]:
        squares = [values * part.square().sum(0) for part in outputs.split(vectors)]  # σⱼ²‖Uⱼ‖², its rows
        scales = zip(squares, outputs.scales, strict=True)
        captured = [each / s if s > 0 else torch.zeros_like(each) for each, s in scales]  # 0: nothing is lost
    else:
        captured = []
        for side, part in zip(outputs.sides, outputs.split(matrix), strict=True):
            half = inputs.times_root(side.pull_back(part))
            captured.append((vectors * (inputs.times_root(half.T) @ vectors)).sum(0).clamp(min=0))
    rounding = rounding_of(weights[0].dtype)
    return tuple(ErrorCurve(_tail(each).cpu(), scale, rounding) for each in captured)


def _tail(captured: Tensor) -> Tensor:
    """Return what is left after each component: ``tail[k] = Σ_{j>k} captured[j]``."""
    return torch.cat([captured.flip(0).cumsum(0).flip(0), captured.new_zeros(1)])

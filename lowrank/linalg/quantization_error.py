"""What quantizing is going to cost, as shares of a squared norm: for choosing between ways to store a weight.

The rounding of weights is measured, by quantizing them. That of integer inputs is that of a uniform
distribution within steps, for rows of n normal features, whose largest is about √(2 ln n) deviations.
"""

from __future__ import annotations

import math

from torch import Tensor

from lowrank.linalg.matmul import product
from lowrank.linalg.metric import Metric
from lowrank.linalg.quantization import (
    dequantize_scaled,
    dequantize_weight,
    quantize_scaled,
    quantize_weight,
    smooth_scale_of,
)
from lowrank.linalg.rotation import rotated
from lowrank.linalg.schemes import Scheme
from lowrank.linalg.svd import truncated_svd


def rounding_error_of(weight: Tensor, scheme: Scheme, moments: Tensor | None = None) -> Tensor:
    """Return ``W − Q`` in float32; with ``moments (in, in)`` of its inputs the layer scales these.

    int8 is rounded without error feedback here: its loss is small, and that costs a hundredth of the time.
    """
    smooth_scale = smooth_scale_of(weight, moments.diagonal()) if moments is not None else None
    used = None if scheme.storage.rounds_inputs else moments
    return weight.detach().float() - dequantize_scaled(
        *quantize_scaled(weight, scheme, smooth_scale, used), scheme, smooth_scale
    )


def weight_quantization_error(
    weight: Tensor, lost: Tensor, scheme: Scheme, metric: Metric = Metric()
) -> float:
    """Return the share of ``‖W‖²`` that a quantized ``weight (out, in)`` loses, with that of its inputs."""
    return _share(lost, weight, metric) + input_quantization_error(weight.shape[1], scheme)


def factors_quantization_error(
    weight: Tensor, rank: int, scheme: Scheme, metric: Metric = Metric(), moments: Tensor | None = None
) -> float:
    """Return the share of ``‖LR‖²`` that quantizing both factors loses, measured at one rank.

    The factors are rotated before, as they are when they are quantized. The arguments are those of
    `lowrank.linalg.truncated_svd` and `lowrank.linalg.quantize_weight`.
    """
    left, right, *_ = truncated_svd(weight.detach().float(), rank, metric)
    low = product(left, right)
    left, right = rotated(left, right, seed=0)
    right = right - rounding_error_of(right, scheme, moments)
    between = right.double() @ moments @ right.double().T if moments is not None else None
    left = dequantize_weight(
        *quantize_weight(left, scheme, None if scheme.storage.rounds_inputs else between), scheme
    )
    lost = low - product(left, right)
    return (
        _share(lost, low, metric)
        + input_quantization_error(weight.shape[1], scheme)
        + input_quantization_error(rank, scheme)
    )


def rows_quantization_error(
    embedding: Tensor,
    centred: Tensor,
    scheme: Scheme,
    metric: Metric = Metric(),
    moments: Tensor | None = None,
) -> float:
    """Return the share of the norm of ``centred``, an embedding less its mean row, that quantizing loses.

    Rows are looked up, not multiplied. ``moments`` are those by which they are rounded.
    """
    used = None if scheme.storage.rounds_inputs else moments
    stored = dequantize_weight(*quantize_weight(embedding, scheme, used), scheme)
    return _share(embedding.detach().float() - stored, centred, metric)


def embedding_quantization_error(
    embedding: Tensor, rank: int, scheme: Scheme, metric: Metric = Metric()
) -> float:
    """Return the share of ``‖LR‖²`` that quantizing the factors of ``embedding (rows, columns)`` loses, at
    one rank.

    Rows of ``L`` are quantized and rows of ``Rᵀ``, after a rotation that evens the latter out.
    """
    left, right, *_ = truncated_svd(embedding.detach().float(), rank, metric)
    low = product(left, right)
    up, down = rotated(right.T, left.T, seed=0)  # (columns, rank), (rank, rows)
    up, down = up - rounding_error_of(up, scheme), down.T - rounding_error_of(down.T, scheme)
    return _share(low - product(down, up.T), low, metric) + input_quantization_error(rank, scheme)


def input_quantization_error(features: int, scheme: Scheme) -> float:
    """Return the share that rounding the inputs loses, of those schemes that multiply integers."""
    return 2 * math.log(features + 1) / (12 * 127**2) if scheme.storage.rounds_inputs else 0.0


def _share(lost: Tensor, whole: Tensor, metric: Metric) -> float:
    norm = metric.squared_norm(whole)
    return metric.squared_norm(lost) / norm if norm > 0 else 0.0

"""The error of a factorization at every rank, from one eigendecomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank.linalg.eigen import eigvalsh
from lowrank.linalg.metric import Metric
from lowrank.linalg.svd import checked_weight, rounding_of, small_side_gram


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Squared errors of the best factorization at every rank.

    Args:
        tail: Shape ``(min(out, in) + 1,)``, float64: ``tail[k] = Σ_{i>k} σ_i²``, the squared error
            that remains at rank ``k``, in units of ``scale²``. Of joint factors, the part of one weight.
        scale: The power of two that a weight was divided by lest its squares overflow; mostly 1.
        rounding: Relative error that storing the factors in half precision adds, else 0. Predictions
            include it; ``tail`` does not.
        held_out: Squared errors on tokens that factors were not fitted to, beside those of ``tail`` and in
            their unit; ``None`` if they are not known.
        whole: ``‖W‖²`` in units of ``scale²``, where the errors are not those of W itself but of what
            codes have lost of it; else ``tail[0]``.
    """

    tail: Tensor
    scale: float = 1.0
    rounding: float = 0.0
    whole: float | None = None
    held_out: Tensor | None = None

    def relative_error(self, rank: int) -> float:
        """Return ``‖W − LR‖ / ‖W‖`` at ``rank``; 0 for a weight of zeros."""
        total = self._total
        return math.sqrt(float(self._rounded[rank]) / total) if total > 0 else 0.0

    def squared_error(self, rank: int) -> float:
        """Return ``‖W − LR‖²`` at ``rank``, in the metric's units."""
        return float(self._rounded[rank]) * self.scale * self.scale

    @property
    def squared_norm(self) -> float:
        """``‖W‖²`` in the metric's units."""
        return self._total * self.scale * self.scale

    @property
    def _total(self) -> float:
        return float(self.tail[0]) if self.whole is None else self.whole

    @property
    def expected(self) -> Tensor:
        """Squared errors to expect on other data, in units of ``scale²``: those of ``held_out`` if known."""
        return self.tail if self.held_out is None else self.held_out

    @property
    def expected_norm(self) -> float:
        """``‖W‖²`` to expect on other data, in the metric's units."""
        ratio = float(self.expected[0] / self.tail[0]) if self.tail[0] > 0 else 1.0
        return ratio * self.squared_norm

    def expected_squared_error(self, rank: int) -> float:
        """Return ``‖W − LR‖²`` to expect on other data at ``rank``, in the metric's units."""
        return float(self._with_rounding(self.expected)[rank]) * self.scale * self.scale

    def with_ratios(self, ratios: Tensor) -> ErrorCurve:
        """Return the curve with errors on held-out tokens that are ``ratios`` times the squared ones here."""
        return replace(self, held_out=self.tail * ratios)

    def smallest_rank(self, relative_error: float) -> int:
        """Return the smallest rank, at least 1, whose relative error is at most ``relative_error``.

        Where rounding forbids so small an error, it is the full rank, which never pays.
        """
        enough = (self._rounded <= relative_error**2 * self._total).nonzero()
        return max(1, int(enough[0])) if len(enough) else len(self.tail) - 1

    @property
    def _rounded(self) -> Tensor:
        return self._with_rounding(self.tail)

    def _with_rounding(self, errors: Tensor) -> Tensor:
        return errors + self.rounding**2 * (errors[0] - errors)

    @property
    def singular_values(self) -> Tensor:
        """Singular values, largest first, shape ``(min(out, in),)``, float64."""
        return (self.tail[:-1] - self.tail[1:]).clamp(min=0).sqrt() * self.scale


def error_curve(weight: Tensor, metric: Metric = Metric()) -> ErrorCurve:
    """Return the squared error ``Σ_{i>k} σ_i²`` at every rank ``k``.

    The squared singular values are the eigenvalues of the Gram matrix of the smaller side. They are
    computed in float64, since forming the Gram matrix squares the condition number: errors are then
    right down to about 1e-7 of the norm, the resolution of a float32 weight.

    Args:
        weight: Shape ``(out, in)``, any floating dtype, any device.
        metric: What the error measures.

    Returns:
        A `ErrorCurve` on the CPU (some kilobytes, for decisions).

    Raises:
        WeightError: If the weight is not a finite floating-point matrix.

    Example:
        >>> error_curve(torch.diag(torch.tensor([3.0, 4.0]))).relative_error(1)
        0.6
    """
    matrix, scale = checked_weight(weight, metric.plain)
    squares = small_side_gram(matrix.to(torch.float64), metric)
    values = eigvalsh(squares).clamp(min=0)  # ascending
    tail = torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)
    return ErrorCurve(tail.cpu(), scale, rounding_of(weight.dtype))

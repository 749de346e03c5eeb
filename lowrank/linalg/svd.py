"""Truncated SVD under a metric: one function, two solvers, and an error that can be trusted.

Both solvers work on the Gram matrix of the smaller side of ``B = Hᵀ W S``, with ``G = H Hᵀ`` and
``C = S Sᵀ``; its eigenvectors are the singular vectors. *exact* takes all of them from LAPACK or
cuSOLVER. *randomized* takes the leading ones and proves that no rank-k factorization is better by
more than the tolerance (`lowrank.linalg.randomized`); where it cannot, the exact solver runs instead.

The best approximation of ``B`` leads back to ``W`` without inverting ``C`` or ``G``. With the right
singular vectors ``V`` (tall weights) or the left ones ``U`` (wide weights)

    LR = W S V σ⁻² Vᵀ Sᵀ (Wᵀ G W)        LR = W C Wᵀ H U σ⁻² Uᵀ Hᵀ W

so that only the singular values which are kept stand below a fraction line. Either says: ``R`` picks
k features of the input, and ``L`` is the linear regression of the dense output on them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.arguments import is_whole
from lowrank.errors import LowRankError, RankError, WeightError
from lowrank.linalg.eigen import eigh
from lowrank.linalg.matmul import product
from lowrank.linalg.metric import Metric, PulledBack, gram, powers_of_two
from lowrank.linalg.randomized import leading_eigenspace

SOLVERS = ("auto", "exact", "randomized")

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The Gram matrix squares the condition number. Its float32 rounding, about 1e-6 of the squared
# norm, is far below the squared error as long as that is more than 1 % of it (a relative error of
# 10 %); in float64 the same holds down to a relative error of 1e-5; below that, a real SVD.
_RESOLVED = {torch.float32: 1e-2, torch.float64: 1e-10}

MOST_IN_FLOAT16 = 2.0**14
"""Half of what elements of a factor in float16 are kept below, which ends at 65,504."""

ROUNDING = 0.3
"""Relative error of a product of two factors rounded to half precision, in units of their epsilon.

A value spread evenly over its binade is rounded by 0.2 epsilons, root mean square, and there are two.
"""


class Factors(NamedTuple):
    """The product ``left @ right`` and how far it is from the weight."""

    left: Tensor  # (out, rank), dtype of the weight
    right: Tensor  # (rank, in), dtype of the weight
    relative_error: float  # ‖G^½ (W − LR) C^½‖_F / ‖G^½ W C^½‖_F
    solver: str  # the solver that made it: "exact" or "randomized"


def choose_solver(rows: int, columns: int, rank: int) -> str:
    """Name the solver that is faster for this shape: ``"exact"`` or ``"randomized"``.

    The randomized one costs about twenty products with a block of 1.5 ranks, and a Cholesky
    factorization for its certificate; the exact one costs about nine cubes of the smaller side.

    Example:
        >>> choose_solver(1000, 1000, 100), choose_solver(1000, 1000, 400), choose_solver(64, 64, 4)
        ('randomized', 'exact', 'exact')
    """
    side = min(rows, columns)
    return "randomized" if side >= 512 and 7 * rank <= side else "exact"


def truncated_svd(
    weight: Tensor,
    rank: int,
    metric: Metric = Metric(),
    *,
    solver: str = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Factors:
    """Factor ``weight`` into the best product of rank ``rank``.

    Minimises ``‖G^½ (W − LR) C^½‖_F``, with ``G = I`` and ``C = I`` for the default metric.

    Args:
        weight: Shape ``(out, in)``, any floating dtype, any device. Half precision is computed in
            float32, and float32 in float64 where the result would not be resolved otherwise, and
            under any metric but the default.
        rank: Inner size, ``1 <= rank <= min(out, in)``.
        metric: What the error measures.
        solver: ``"auto"`` (see `choose_solver`), ``"exact"`` or ``"randomized"``.
        tolerance: Largest allowed excess over the optimal error, relative; only the randomized
            solver uses it. It goes exact rather than return worse.
        seed: Seed of the randomized solver; the global random state is not touched.

    Returns:
        `Factors` in the dtype and on the device of ``weight``, with their relative error: from the
        eigenvalues where these resolve it, else, and always in half precision, measured. Under other
        metrics than the default half precision adds what rounding does on average.

    Raises:
        RankError: If ``rank`` is outside ``1 .. min(out, in)``.
        WeightError: If the weight is not a finite floating-point matrix; or if its dtype cannot hold the
            factors, which can be much larger than it in directions that hardly matter under the metric.

    Source: Eckart & Young 1936; for the metric, DRONE (Chen et al. 2021).

    Example:
        >>> factors = truncated_svd(torch.eye(4), rank=3)
        >>> tuple(factors.left.shape), tuple(factors.right.shape), factors.relative_error
        ((4, 3), (3, 4), 0.5)
    """
    if solver not in SOLVERS:
        raise LowRankError(f"solver={solver!r}: choose one of {', '.join(SOLVERS)}.")
    check_options(tolerance, seed)
    matrix, scale = checked_weight(weight, metric.plain)
    if not is_whole(rank) or not 1 <= rank <= min(matrix.shape):
        raise RankError(
            f"rank {rank!r} of a weight (out={matrix.shape[0]}, in={matrix.shape[1]}): "
            f"give a whole number from 1 to {min(matrix.shape)}."
        )
    rank, seed = int(rank), int(seed)
    if solver == "auto":
        solver = choose_solver(matrix.shape[0], matrix.shape[1], rank)
    with torch.no_grad():
        found = None
        if solver == "randomized" and rank < min(matrix.shape):
            found = _randomized(matrix, rank, metric, tolerance, seed)
        if found is None:
            solver, found = "exact", _exact(matrix, rank, metric)
        left, right, error = found
        if weight.dtype == torch.float16:
            left, right = balanced(left, right)
        half = 2.0 ** (math.frexp(scale)[1] // 2)  # of the scale in each, so that neither leaves the range
        left, right = (half * left).to(weight.dtype), (scale / half * right).to(weight.dtype)
        check_factors(left, right)
        if error is not None and isinstance(metric.outputs, PulledBack):
            error = with_rounding(error, left)
        elif error is None or rounding_of(weight.dtype):
            error = measured_error(matrix, left.to(matrix) / half, right.to(matrix) / (scale / half), metric)
    return Factors(left.contiguous(), right.contiguous(), error, solver)


def rounding_of(dtype: torch.dtype) -> float:
    """Return the relative error that storing factors in ``dtype`` adds; 0 but in half precision."""
    return ROUNDING * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0


def check_options(tolerance: float, seed: int) -> None:
    """Check the options of the randomized solver, also where it will not be chosen.

    Raises:
        LowRankError: If ``tolerance`` is not a positive number, or ``seed`` not a whole one.
    """
    if not isinstance(tolerance, (int, float)) or not tolerance > 0:
        raise LowRankError(f"tolerance={tolerance!r} must be a positive number: it bounds a relative excess.")
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise LowRankError(f"seed={seed!r} must be a whole number, from 0 to 2⁶³ − 1.")


def checked_weight(weight: Tensor, plain: bool = True) -> tuple[Tensor, float]:
    """Return the weight in its computing dtype, divided by a power of two if squares would overflow.

    Args:
        weight: What is to be factorized.
        plain: Whether its own norm is the metric. Under others it is float64 and not divided: data lie in few
            directions, so that small tails and small elements must be resolved.

    Returns:
        The matrix ``(out, in)`` in float32 or float64, and the scale it was divided by.

    Raises:
        WeightError: If it is not a floating-point matrix, has no data, or is not finite.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise WeightError(f"A weight is a matrix (out, in); this one has shape {tuple(weight.shape)}.")
    if weight.dtype not in FLOATING:
        raise WeightError(f"The weight is {weight.dtype}, not floating point: it may be quantized already.")
    if weight.is_meta:
        raise WeightError("The weight is on the meta device and has no data. Load the weights first.")
    weight = weight.detach()
    lowest, highest = torch.aminmax(weight)
    largest = float(torch.maximum(-lowest, highest))
    if not math.isfinite(largest):
        bad = int((~weight.isfinite()).sum())
        raise WeightError(f"The weight has {bad:,} of {weight.numel():,} values that are NaN or infinite.")
    matrix = weight.to(torch.float32 if plain and weight.dtype != torch.float64 else torch.float64)
    if not plain or largest == 0 or 1e-8 < largest < 1e8:
        return matrix, 1.0
    exponent = math.frexp(largest)[1] - 1
    half, scale = 2.0 ** (exponent // 2), 2.0**exponent
    return matrix / half / (scale / half), scale  # in two steps: the inverse of a subnormal scale is infinite


def small_side_gram(matrix: Tensor, metric: Metric) -> Tensor:
    """Return ``BᵀB`` or ``BBᵀ`` of ``B = Hᵀ W S``, whichever is smaller; both have the wanted eigenvalues."""
    rows, columns = matrix.shape
    if metric.plain:
        return without_dust(gram(matrix if rows <= columns else matrix.T))
    if rows <= columns:
        entered = metric.outputs.enter(matrix)  # Hᵀ W
        squares = product(metric.inputs.times(entered), entered.T)
    else:
        half = metric.inputs.times_root(metric.outputs.pull_back(matrix))  # Wᵀ G W S
        squares = metric.inputs.times_root(half.T)
    return without_dust((squares + squares.T) / 2)


def without_dust(squares: Tensor) -> Tensor:
    """Set to zero what is nothing beside the largest element: subnormal ones can keep LAPACK from an end."""
    largest = squares.diagonal().max()
    return torch.where(squares.abs() > torch.finfo(squares.dtype).eps ** 2 * largest, squares, 0.0)


_Found = tuple[Tensor, Tensor, float | None]  # left, right, and the relative error if resolved


def _exact(matrix: Tensor, rank: int, metric: Metric) -> _Found:
    """Factor by a full eigendecomposition, in float64 where float32 does not resolve the error."""
    values, vectors = eigh(small_side_gram(matrix, metric))
    values = values.clamp(min=0).to(torch.float64)
    total, tail = float(values.sum()), float(values[:-rank].sum())
    if tail > _RESOLVED[matrix.dtype] * total or total == 0 or not metric.plain:
        error = math.sqrt(tail / total) if total else 0.0
        left, right = _factors(matrix, vectors[:, -rank:].flip(1), values[-rank:].flip(0), metric)
        return left, right, error
    if matrix.dtype == torch.float64:
        left = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
        return left, left.T @ matrix, None
    left, right, resolved = _exact(matrix.to(torch.float64), rank, metric)
    return left.to(matrix.dtype), right.to(matrix.dtype), resolved


def components(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Factor ``weight`` at full rank: the first k components are its best factors of rank k, for every k.

    Args:
        weight: Shape ``(out, in)``, as for `truncated_svd`.
        metric: What the error measures; not the plain one.

    Returns:
        ``left (out, ranks)`` and ``right (ranks, in)`` in the dtype of ``weight``, with ranks = min(out, in),
        and the squared singular values, largest first, in float64.
    """
    matrix, _ = checked_weight(weight, plain=False)
    values, vectors = eigh(small_side_gram(matrix, metric))
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
    left, right = _factors(matrix, vectors, values, metric)
    if weight.dtype == torch.float16:
        left, right = balanced(left, right)
    left, right = left.to(weight.dtype), right.to(weight.dtype)
    check_factors(left, right)
    return left, right, values


def _randomized(matrix: Tensor, rank: int, metric: Metric, tolerance: float, seed: int) -> _Found | None:
    """Factor by certified subspace iteration; ``None`` where the tolerance cannot be proven."""
    squares = small_side_gram(matrix, metric)
    excess = (1 + tolerance) ** 2 - 1  # of squared errors
    space = leading_eigenspace(squares, rank, excess, seed)
    total = float(squares.diagonal().sum(dtype=torch.float64))
    tail, smallest_tail = total - space.captured, total - space.bound
    if tail > (1 + excess) * smallest_tail or tail < _RESOLVED[matrix.dtype] * total:
        return None
    captured = (
        (space.basis * product(squares, space.basis)).sum(0) if not metric.plain else squares.new_empty(0)
    )
    left, right = _factors(matrix, space.basis, captured, metric)
    return left, right, math.sqrt(tail / total)


def _factors(matrix: Tensor, vectors: Tensor, squares: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Turn leading eigenvectors of `small_side_gram`, with eigenvalues ``squares``, into factors.

    Under a metric the factors share each component's norm evenly, as training them later likes it.
    """
    rows, columns = matrix.shape
    if metric.plain:
        wide = rows <= columns
        return (vectors, product(vectors.T, matrix)) if wide else (product(matrix, vectors), vectors.T)
    squares = squares.to(matrix)
    kept = (
        squares > torch.finfo(matrix.dtype).eps * rows * squares[0]
    )  # beyond the rank of B, nothing is left
    inverse = kept / torch.where(kept, squares, 1.0)
    if rows <= columns:
        right = product(vectors.T, metric.outputs.enter(matrix))  # Uᵀ Hᵀ W
        left = product(matrix, metric.inputs.times(right).T)  # W C Wᵀ H U
    else:
        basis = metric.inputs.root_times(vectors)  # S V
        left, right = product(matrix, basis), product(basis.T, metric.outputs.pull_back(matrix))
    return evened(kept * left, inverse[:, None] * right)


def evened(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Share each component's norm evenly between the factors."""
    norms = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    shift = (norms[1] / norms[0]).sqrt()
    shift = torch.where(shift.isfinite() & (shift > 0), shift, 1.0)
    return left * shift, right / shift[:, None]


def balanced(left: Tensor, right: Tensor, together: bool = False) -> tuple[Tensor, Tensor]:
    """Move powers of two between the factors, so that nothing leaves the narrow range of float16.

    With ``together`` it is the same power for all components, which keeps their relative sizes. Else each
    component's elements become equally large in both. Or ``left`` takes more, so that what is between
    the factors, ``z = R x = L⁺ y``, is nowhere larger than all of what the layer reads or returns: by
    Hölder's inequality it is not, once a row of ``R`` or of ``L⁺`` has an absolute sum of 1.
    """
    largest = left.abs().amax(0), right.abs().amax(1)
    used = (largest[0] > 0) & (largest[1] > 0)
    sums = torch.minimum(right.abs().sum(1), torch.linalg.pinv(left.double()).to(left).abs().sum(1))
    shift = torch.maximum((largest[1] / largest[0]).sqrt(), sums)
    if together and bool(used.any()):
        shift, largest = shift[used].max(), (largest[0].max(), largest[1])
    shift = torch.minimum(shift, MOST_IN_FLOAT16 / largest[0])
    shift = 2 * powers_of_two(torch.where(used & (shift > 0), shift, 0.5))  # rounded up
    return left * shift, right / shift[:, None]


def check_factors(left: Tensor, right: Tensor) -> None:
    """Refuse factors that have left the range of their dtype.

    Raises:
        WeightError: If an element is not finite.
    """
    if not bool(left.isfinite().all() and right.isfinite().all()):
        dtype = str(left.dtype).removeprefix("torch.")
        raise WeightError(
            f"its factors have elements beyond what {dtype} holds under this metric. Convert the model to "
            "bfloat16 or float32, or use another metric."
        )


def with_rounding(error: float, left: Tensor) -> float:
    """Return a relative error with what storing ``left``, and its other factor, adds on average.

    That is for a metric pulled back through W, which cannot measure other matrices.
    """
    rounding = rounding_of(left.dtype) if bool(left.any()) else 0.0
    return math.sqrt(error**2 + rounding**2 * (1 - error**2))


def measured_error(matrix: Tensor, left: Tensor, right: Tensor, metric: Metric) -> float:
    """Return the relative error of ``left @ right`` under ``metric``; 0 for a matrix that it does not see."""
    lost = matrix - product(left, right)
    if not metric.plain:
        norm = metric.squared_norm(matrix)
        return math.sqrt(metric.squared_norm(lost) / norm) if norm > 0 else 0.0
    norm = float(torch.linalg.matrix_norm(matrix))
    return float(torch.linalg.matrix_norm(lost)) / norm if norm else 0.0

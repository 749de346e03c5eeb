"""`truncated_svd` against the Eckart–Young bound: no factorization of the same rank is closer."""

import math

import pytest
import torch
from closeness import CANCELLED32, SUMS64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowrank.errors import LowRankError, RankError, WeightError
from lowrank.linalg import choose_solver, truncated_svd
from lowrank.linalg import svd as svd_module
from lowrank.linalg.randomized import Eigenspace

TOLERANCE = 1e-3  # what `truncated_svd` promises by default, relative to the optimal error
SHAPES = {"wide": (40, 90), "tall": (90, 40), "square": (64, 64)}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def optimal_error(weight: Tensor, rank: int) -> float:
    """The slow oracle: the relative error of the best factorization, from all singular values."""
    values = torch.linalg.svdvals(weight.detach().double())
    return float(values[rank:].norm() / values.norm()) if values[0] > 0 else 0.0


def measured_error(weight: Tensor, left: Tensor, right: Tensor) -> float:
    weight = weight.detach().double()
    norm = float(weight.norm())
    return float((weight - left.double() @ right.double()).norm()) / norm if norm else 0.0


def rounding(dtype: torch.dtype) -> float:
    """Relative error that arithmetic may add: two factors are stored in ``dtype``, half a unit each.

    LAPACK's vectors are orthogonal to some units of the computing dtype, float32 for the halves.
    """
    computing = dtype if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps + 20 * torch.finfo(computing).eps


def assert_optimal(weight: Tensor, rank: int, solver: str = "auto", excess: float = TOLERANCE) -> None:
    left, right, reported, _ = truncated_svd(weight, rank, solver=solver)
    assert left.dtype == right.dtype == weight.dtype
    assert left.shape == (weight.shape[0], rank)
    assert right.shape == (rank, weight.shape[1])
    best, error = optimal_error(weight, rank), measured_error(weight, left, right)
    assert error <= best * (1 + excess) + rounding(weight.dtype)
    assert error >= best * (1 - 1e-9) - 1e-15  # below the bound, the measurement itself is wrong
    assert reported == pytest.approx(error, rel=1e-3, abs=rounding(weight.dtype))


@pytest.fixture(scope="module", params=["uniform", "gaussian"])
def first_example(request) -> tuple[Tensor, float]:
    """A random 1000×1000 matrix, and the relative error of `torch.linalg.svd` truncated at 100."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if request.param == "uniform" else torch.randn
    weight = draw(1000, 1000, generator=generator)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return weight, measured_error(weight, u[:, :100] * s[:100], vt[:100])


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_the_first_example_is_within_a_tenth_of_a_percent_of_torch_svd(first_example, solver):
    weight, best = first_example
    left, right, reported, used = truncated_svd(weight, 100, solver=solver)

    assert used == solver  # random matrices are within the certificate's reach
    assert best <= measured_error(weight, left, right) * (1 + 1e-6)
    assert measured_error(weight, left, right) <= best * (1 + TOLERANCE)
    assert reported == pytest.approx(measured_error(weight, left, right), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 17, 39, 40])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_reaches_the_eckart_young_bound(shape, dtype, rank):
    assert_optimal(gaussian(*shape).to(dtype), rank, excess=2e-4)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)], ids=["row", "column", "number"])
def test_a_vector_and_a_number_are_reproduced(shape, solver):
    weight = gaussian(*shape) + 2
    left, right, error, _ = truncated_svd(weight, 1, solver=solver)
    torch.testing.assert_close(left @ right, weight)
    assert error <= 1e-14


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("rank", [1, 5, 6, 30], ids=lambda r: f"rank-{r}-of-5")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_rank_deficient_weight_is_reproduced_from_its_rank_on(matrix_with, shape, rank, solver):
    weight = matrix_with([5.0, 4, 3, 2, 1], *shape)
    assert_optimal(weight, rank, solver)
    left, right, *_ = truncated_svd(weight, rank, solver=solver)
    if rank >= 5:
        torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-13 * float(weight.norm()))  # 450 eps


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_weight_of_zeros_gives_zeros_and_no_error(shape, solver):
    left, right, error, _ = truncated_svd(torch.zeros(shape), 3, solver=solver)
    assert error == 0
    assert torch.equal(left @ right, torch.zeros(shape))


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=["huge", "tiny"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_squares_beyond_the_dtype_do_no_harm(shape, scale, dtype, solver):
    assert_optimal((gaussian(*shape) * scale).to(dtype), 9, solver)


@pytest.mark.parametrize("scale", [3e3, 1e4, 1e-4], ids=["3e3", "1e4", "1e-4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_half_precision_factors_stay_in_range_when_the_weight_does(matrix_with, shape, scale):
    rank_one = matrix_with([math.prod(shape) ** 0.5], *shape)  # entries of size one on average
    weight = (rank_one / rank_one.abs().max() * scale).half()
    left, right, *_ = truncated_svd(weight, 2)
    assert left.isfinite().all()
    assert right.isfinite().all()
    # 1e-4 is 1,700 steps of the smallest half-precision number; its rounding is about 3e-4.
    assert measured_error(weight, left, right) <= 3 * torch.finfo(torch.float16).eps


def test_a_half_precision_weight_of_one_large_value_gives_finite_factors():
    weight = torch.full((64, 64), 1e4, dtype=torch.float16)
    left, right, error, _ = truncated_svd(weight, 1)
    assert left.isfinite().all()
    assert right.isfinite().all()
    assert error <= rounding(torch.float16)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w[::2, ::3],
        lambda w: w.flip(0).T[5:],
        lambda w: w[:1].expand(30, -1),
    ],
    ids=["transposed", "strided", "offset", "expanded"],
)
def test_memory_layout_does_not_matter(view, solver):
    weight = view(gaussian(90, 60))
    assert_optimal(weight, 4, solver)
    ours, packed = truncated_svd(weight, 4, solver=solver), truncated_svd(weight.clone(), 4, solver=solver)
    torch.testing.assert_close(ours.left @ ours.right, packed.left @ packed.right)
    assert ours.left.is_contiguous()
    assert ours.right.is_contiguous()


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("rank", [1, 10, 20, 30, 39])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_condition_number_of_1e12_is_allowed(matrix_with, shape, dtype, rank, solver):
    values = torch.logspace(0, -12, min(shape), dtype=torch.float64)
    assert_optimal(matrix_with(values, *shape).to(dtype), rank, solver)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("noise", [1e-4, 1e-6], ids=["noise-1e-4", "noise-1e-6"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_nearly_low_rank_float32_weight_keeps_its_digits(matrix_with, shape, noise, solver):
    weight = (matrix_with([8.0] * 8, *shape) + noise * gaussian(*shape, seed=1)).float()
    left, right, *_ = truncated_svd(weight, 8, solver=solver)
    best = optimal_error(weight, 8)
    assert best < 5 * noise  # a Gram matrix in float32 would not see below 3e-4
    assert measured_error(weight, left, right) <= best * (1 + TOLERANCE) + rounding(torch.float32)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_a_trainable_weight_is_not_tied_to_its_factors(solver):
    weight = torch.nn.Parameter(gaussian(60, 50).float())
    before = weight.detach().clone()
    left, right, error, _ = truncated_svd(weight, 5, solver=solver)
    assert not left.requires_grad
    assert not right.requires_grad
    assert isinstance(error, float)
    assert torch.equal(weight, before)
    assert weight.grad is None


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_equal_seeds_give_equal_bits(solver):
    weight = gaussian(120, 100).float()
    one, two = (
        truncated_svd(weight, 6, solver=solver, seed=3),
        truncated_svd(weight, 6, solver=solver, seed=3),
    )
    assert one.solver == solver
    assert torch.equal(one.left, two.left)
    assert torch.equal(one.right, two.right)
    assert one.relative_error == two.relative_error


def test_the_seed_reaches_the_randomized_solver():
    weight = gaussian(120, 100).float()
    one, two = (truncated_svd(weight, 6, solver="randomized", seed=seed) for seed in (0, 1))
    assert not torch.equal(one.left, two.left)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_the_global_random_state_is_neither_read_nor_moved(solver):
    weight = gaussian(120, 100).float()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = truncated_svd(weight, 6, solver=solver)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(truncated_svd(weight, 6, solver=solver).left, one.left)


def profile(kind: str, size: int, steepness: float) -> Tensor:
    """Singular values, largest first, the largest is 1; ``steepness`` from 0 (mild) to 1."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    if kind == "power-law":
        return index ** -(0.1 + 2 * steepness)
    if kind == "exponential":
        return torch.exp(-(index - 1) * (0.005 + steepness / 4))
    if kind == "step":
        return torch.where(index <= max(1, size // 3), 1.0, 0.9 * (1 - steepness) + 1e-3)
    if kind == "outlier":
        return torch.where(index == 1, 1.0, 0.9 * (1 - steepness) + 1e-3)
    return torch.ones(size, dtype=torch.float64)  # flat: every subspace is as good as any other


SPECTRA = st.builds(
    profile,
    st.sampled_from(["power-law", "exponential", "step", "outlier", "flat"]),
    st.integers(20, 120),
    st.floats(0, 1),
)


@given(
    values=SPECTRA,
    share=st.floats(0.01, 0.9),
    extra=st.integers(0, 60),
    tall=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_randomized_solver_is_never_worse_than_its_tolerance(
    matrix_with, values, share, extra, tall, double, seed
):
    size = len(values)
    shape = (size + extra, size) if tall else (size, size + extra)
    weight = matrix_with(values, *shape, seed=seed).to(torch.float64 if double else torch.float32)
    rank = max(1, int(share * size))
    left, right, reported, _ = truncated_svd(weight, rank, solver="randomized", seed=seed)
    error = measured_error(weight, left, right)
    assert error <= optimal_error(weight, rank) * (1 + TOLERANCE) + rounding(weight.dtype)
    assert reported == pytest.approx(error, rel=CANCELLED32, abs=rounding(weight.dtype))


@given(values=SPECTRA, tolerance=st.sampled_from([1e-1, 1e-2, 1e-4, 1e-6]), seed=st.integers(0, 99))
def test_the_tolerance_that_is_asked_for_is_the_one_that_holds(matrix_with, values, tolerance, seed):
    weight = matrix_with(values, len(values), 130, seed=seed)
    rank = max(1, len(values) // 8)
    left, right, *_ = truncated_svd(weight, rank, solver="randomized", tolerance=tolerance, seed=seed)
    assert measured_error(weight, left, right) <= optimal_error(weight, rank) * (1 + tolerance) + 1e-12


@pytest.mark.parametrize(
    ("kind", "rank"), [("power-law", 20), ("exponential", 20), ("step", 66), ("outlier", 1)], ids=str
)
def test_the_randomized_solver_proves_ordinary_spectra_and_need_not_go_exact(matrix_with, kind, rank):
    # So mild that more than 1 % of the squared norm remains, as float32 needs; at the step, a gap of 10 %.
    weight = matrix_with(profile(kind, 200, 0.02), 200, 260).float()
    assert truncated_svd(weight, rank, solver="randomized").solver == "randomized"


def a_random_basis(matrix: Tensor, rank: int, tolerance: float, seed: int) -> Eigenspace:
    basis = torch.linalg.qr(torch.randn(len(matrix), rank, dtype=matrix.dtype)).Q
    return Eigenspace(basis, float((basis.T @ matrix @ basis).trace()), math.inf)


def test_an_unproven_basis_is_thrown_away_for_the_exact_solution(monkeypatch):
    weight = gaussian(100, 80)
    monkeypatch.setattr(svd_module, "leading_eigenspace", a_random_basis)
    left, right, reported, used = truncated_svd(weight, 10, solver="randomized")
    assert used == "exact"
    assert measured_error(weight, left, right) == pytest.approx(optimal_error(weight, 10), rel=SUMS64)
    assert reported == pytest.approx(optimal_error(weight, 10), rel=SUMS64)


def test_a_bound_beyond_the_tolerance_is_not_good_enough(monkeypatch):
    def slightly_short(matrix: Tensor, rank: int, tolerance: float, seed: int) -> Eigenspace:
        values, vectors = torch.linalg.eigh(matrix)
        best = float(values[-rank:].sum())
        tail = float(values[:-rank].sum())
        return Eigenspace(vectors[:, -rank:], best - 0.003 * tail, best)

    weight = gaussian(100, 80)
    monkeypatch.setattr(svd_module, "leading_eigenspace", slightly_short)
    # A squared error of 1.003 times the optimum is an error of 1.0015 times.
    assert truncated_svd(weight, 10, solver="randomized", tolerance=1e-3).solver == "exact"
    assert truncated_svd(weight, 10, solver="randomized", tolerance=2e-3).solver == "randomized"


def test_a_certificate_that_never_succeeds_ends_in_the_exact_solution(monkeypatch):
    weight = gaussian(100, 80)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix, upper=False: (matrix, torch.tensor(1)))
    left, right, _, used = truncated_svd(weight, 10, solver="randomized")
    assert used == "exact"
    assert measured_error(weight, left, right) == pytest.approx(optimal_error(weight, 10), rel=SUMS64)


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(520, 560, 50), (560, 520, 50), (520, 520, 300), (64, 64, 4)],
    ids=["wide-520-at-50", "tall-520-at-50", "520-at-300", "64-at-4"],
)
def test_the_choice_of_solver_can_be_asked_for_and_is_the_one_made(rows, columns, rank):
    chosen = choose_solver(rows, columns, rank)
    assert chosen in ("exact", "randomized")
    assert chosen == choose_solver(columns, rows, rank)
    assert truncated_svd(gaussian(rows, columns).float(), rank).solver == chosen


def test_both_solvers_are_chosen_somewhere():
    assert {choose_solver(1000, 1000, rank) for rank in (10, 900)} == {"exact", "randomized"}


@pytest.mark.parametrize(
    "rank",
    [0, -1, 41, 2.0, True, "3", None],
    ids=["zero", "negative", "too-large", "float", "bool", "text", "none"],
)
def test_a_rank_outside_the_weight_is_refused_with_its_range(rank):
    with pytest.raises(RankError, match=r"out=90, in=40.*whole number from 1 to 40"):
        truncated_svd(gaussian(90, 40), rank)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, math.nan], [0, 1]]), "1 of 4 values that are NaN or infinite"),
        (torch.tensor([[math.inf, -math.inf], [0, 1]]), "2 of 4 values that are NaN or infinite"),
        (torch.ones(3, 4, dtype=torch.int8), "int8, not floating point"),
        (torch.ones(3, 4, dtype=torch.complex64), "complex64, not floating point"),
        (torch.ones(3, 4, device="meta"), "meta device and has no data"),
        (torch.ones(4), r"shape \(4,\)"),
        (torch.ones(2, 3, 4), r"shape \(2, 3, 4\)"),
        (torch.ones(0, 4), r"shape \(0, 4\)"),
    ],
    ids=["nan", "inf", "int8", "complex", "meta", "vector", "3d", "empty"],
)
def test_what_cannot_be_factorized_is_refused_with_the_reason(weight, message):
    with pytest.raises(WeightError, match=message) as caught:
        truncated_svd(weight, 1)
    assert isinstance(caught.value, LowRankError)


def test_an_unknown_solver_and_a_useless_tolerance_are_refused():
    with pytest.raises(LowRankError, match="solver='fast': choose one of auto, exact, randomized"):
        truncated_svd(torch.eye(3), 1, solver="fast")
    with pytest.raises(LowRankError, match="tolerance=0 must be a positive number"):
        truncated_svd(torch.eye(3), 1, tolerance=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_cuda_reaches_the_bound_and_stays_on_its_device(dtype, solver):
    weight = gaussian(600, 900).to("cuda", dtype)
    factors = truncated_svd(weight, 40, solver=solver)
    assert factors.left.device == factors.right.device == weight.device
    best = optimal_error(weight.cpu(), 40)
    assert measured_error(weight, factors.left, factors.right) <= best * (1 + TOLERANCE) + rounding(dtype)

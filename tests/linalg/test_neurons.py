"""Neurons that go: the errors are those of the weights fitted anew, and copies cost nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowrank.errors import RankError
from lowrank.linalg import Diagonal, Gram, Identity, Metric, PulledBack
from lowrank.linalg.neurons import DAMPING, neuron_removal, refitted

ROUNDING = 1e-6
"""Damping is 1e-8 of each variance, and what takes over may have some ten times the weights that go."""


def moments_of(size: int, tokens: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(tokens, size, generator=generator, dtype=torch.float64).relu()
    return rows.T @ rows / tokens


def case(out: int, size: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its inputs' second moment and its outputs' metric."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator, dtype=torch.float64)
    return weight, moments_of(size, tokens, generator), moments_of(out, 3 * out, generator)


def true_error(weight: Tensor, kept: Tensor, new: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    change = weight.clone()
    change[:, kept] -= new
    return float(torch.trace(outputs @ change @ inputs @ change.T))


@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from([1.5, 4.0]), st.integers(0, 99), st.booleans())
def test_the_error_at_every_width_is_that_of_the_refitted_weights(out, size, ratio, seed, felt):
    weight, inputs, outputs = case(out, size, int(size * ratio) + 1, seed)
    outputs = outputs if felt else torch.eye(out, dtype=torch.float64)
    metric = Metric(Gram(inputs), Gram(outputs) if felt else Identity())
    removal = neuron_removal(weight, metric)
    total = float(torch.trace(outputs @ weight @ inputs @ weight.T))
    for width in range(1, size + 1):
        kept = removal.kept(width)
        error = true_error(weight, kept, refitted(weight, kept, metric.inputs), inputs, outputs)
        assert removal.errors.squared_error(width) == pytest.approx(error, abs=ROUNDING * total)
    assert removal.errors.squared_norm == pytest.approx(total, rel=ROUNDING)


@given(st.integers(1, 6), st.integers(2, 80), st.integers(0, 99))
def test_errors_never_grow_with_the_width_and_end_at_zero(out, size, seed):
    weight, inputs, outputs = case(out, size, size // 2 + 1, seed)  # fewer tokens than neurons
    tail = neuron_removal(weight, Metric(Gram(inputs), Gram(outputs))).errors.tail
    assert bool((tail[:-1] >= tail[1:]).all()) and float(tail[-1]) == 0
    assert sorted(neuron_removal(weight, Metric(Gram(inputs))).order.tolist()) == list(range(size))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_copies_and_dead_neurons_go_first_and_cost_nothing(out, size, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * size + 4, size, generator=generator, dtype=torch.float64)
    doubled = torch.cat([rows, rows, torch.zeros(len(rows), 3, dtype=torch.float64)], 1)
    weight = torch.randn(out, doubled.shape[1], generator=generator, dtype=torch.float64)
    metric = Metric(Gram(doubled.T @ doubled / len(rows)))
    removal = neuron_removal(weight, metric)
    # for a pair of weights a and b, what damping adds is that of a² + b² + (a + b)² ≤ 3 (a² + b²)
    damping = 3 * DAMPING * float((weight.square() * doubled.square().mean(0)).sum())
    assert removal.errors.squared_error(size) <= 1.01 * damping
    kept = removal.kept(size)
    new = refitted(weight, kept, metric.inputs)
    error = (doubled @ weight.T - doubled[:, kept] @ new.T).square().sum() / len(rows)
    assert float(error) <= 1.01 * damping


def test_refitting_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 30, generator=generator, dtype=torch.float64) @ torch.randn(
        30, 30, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    inputs = Gram(rows.T @ rows / len(rows))
    kept = neuron_removal(weight, Metric(inputs)).kept(20)
    expected = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
    assert torch.allclose(refitted(weight, kept, inputs), expected, rtol=0, atol=1e-3 * float(weight.norm()))


def test_the_order_beats_that_of_magnitudes():
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(40, 120, generator=generator, dtype=torch.float64)
    rows = (torch.randn(4000, 40, generator=generator, dtype=torch.float64) @ mixed).relu()
    weight = torch.randn(32, 120, generator=generator, dtype=torch.float64)
    inputs = Gram(rows.T @ rows / len(rows))
    removal = neuron_removal(weight, Metric(inputs))
    importance = weight.square().sum(0) * inputs.matrix.diagonal()
    for width in (30, 60, 90):
        kept = importance.topk(width).indices.sort().values
        fitted = refitted(weight, kept, inputs)
        identity = torch.eye(32, dtype=torch.float64)
        alone = true_error(weight, kept, weight[:, kept], inputs.matrix, identity)
        taken_over = true_error(weight, kept, fitted, inputs.matrix, identity)
        assert removal.errors.squared_error(width) < taken_over < alone


def test_a_metric_seen_from_the_inputs_gives_the_same():
    weight, inputs, outputs = case(40, 20, 100, seed=2)
    whole = neuron_removal(weight, Metric(Gram(inputs), Gram(outputs)))
    seen = neuron_removal(weight, Metric(Gram(inputs), PulledBack(weight.T @ outputs @ weight)))
    assert torch.equal(whole.order, seen.order)
    assert torch.allclose(whole.errors.tail, seen.errors.tail, rtol=1e-9)


def test_without_moments_the_shortest_columns_go_first():
    weight = torch.tensor([[3.0, 0.1, -2.0], [0.0, 0.1, 1.0]])
    removal = neuron_removal(weight, Metric(Diagonal(torch.tensor([1.0, 1.0, 4.0]))))
    assert removal.order.tolist() == [1, 0, 2]  # 9·1 against 5·4
    assert torch.equal(removal.kept(2), torch.tensor([0, 2]))


@pytest.mark.parametrize("width", [0, 4])
def test_a_width_that_there_is_not_is_refused(width):
    removal = neuron_removal(torch.ones(1, 3), Metric())
    with pytest.raises(RankError, match=rf"width={width} is outside 1 \.\. 3"):
        removal.kept(width)

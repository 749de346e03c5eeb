"""Integers of unlike width within a row: what is stored, what is lost, and what a component's error costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.errors import SchemeError
from lowrank.linalg import Diagonal, Gram, Metric, Scheme, dequantize_weight, quantize_weight, truncated_svd
from lowrank.linalg.mixed_widths import GROUP, even_components, rounded

WIDTHS = st.lists(st.integers(1, 8), min_size=1, max_size=5).map(tuple)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheme_of(widths):
    return Scheme("bits" + "".join(map(str, widths)))


def stored(weight, widths):
    scheme = scheme_of(widths)
    return dequantize_weight(*quantize_weight(weight, scheme), scheme)


@given(widths=WIDTHS, rows=st.integers(1, 7), seed=st.integers(0, 99))
@settings(deadline=None)
def test_shapes_are_those_that_the_scheme_says_and_bits_are_not_wasted(widths, rows, seed):
    scheme = scheme_of(widths)
    codes, scale = quantize_weight(gaussian(rows, GROUP * len(widths), seed=seed), scheme)
    found = {"codes": (codes.shape, codes.dtype), "scale": (scale.shape, scale.dtype)}
    assert found == scheme.tensors(rows, GROUP * len(widths))
    assert codes.nbytes * 8 == rows * GROUP * sum(widths)
    assert scale.nbytes == rows * len(widths)


@given(widths=WIDTHS, octaves=st.integers(-20, 10), seed=st.integers(0, 99))
@settings(deadline=None)
def test_what_is_stored_is_what_is_predicted(widths, octaves, seed):
    weight = gaussian(4, GROUP * len(widths), seed=seed) * 2.0**octaves
    groups = zip(weight.split(GROUP, 1), widths, strict=True)
    expected = torch.cat([rounded(group, width) for group, width in groups], 1)
    assert torch.equal(stored(weight, widths), expected)


@pytest.mark.parametrize(
    ("width", "most"), list(enumerate([0.37, 0.12, 0.038, 0.012, 0.0037, 0.0012, 0.00037, 0.00012], 1))
)
def test_a_bit_more_quarters_the_squared_error(width, most):
    """At most what Max 1960 has for a normal variable (0.3634, 0.1188, 0.0374, …), and 3 % more.

    And not less than Shannon's bound at the bits that are spent, the byte of each scale included.
    """
    weight = gaussian(512, GROUP)
    lost = (weight - stored(weight, (width,))).square().mean() / weight.square().mean()
    assert 4.0 ** -(width + 8 / GROUP) < lost < most


def test_rows_of_any_size_lose_the_same_share():
    weight = gaussian(1, GROUP).repeat(5, 1)
    sizes = torch.tensor([2.0**-10, 2.0**-3, 1.0, 2.0, 2.0**12])[:, None]
    assert torch.equal(stored(weight * sizes, (3,)), stored(weight, (3,)) * sizes)


def test_a_row_of_zeros_stays_zero():
    weight = gaussian(3, 2 * GROUP)
    weight[1] = 0.0
    weight[2, :GROUP] = 0.0
    found = stored(weight, (4, 2))
    assert not found[1].any()
    assert not found[2, :GROUP].any()
    assert found[2, GROUP:].all()


def test_rows_of_a_table_are_dequantized_as_the_whole_is():
    scheme = scheme_of((6, 3, 1))
    codes, scale = quantize_weight(gaussian(40, 3 * GROUP), scheme)
    ids = torch.tensor([[3, 3], [39, 0]])
    assert torch.equal(
        dequantize_weight(codes[ids], scale[ids], scheme), dequantize_weight(codes, scale, scheme)[ids]
    )


@pytest.mark.parametrize("name", ["bits", "bits9", "bits40", "bits4 3", "bits" + "4" * 600])
def test_what_names_no_widths_is_no_scheme(name):
    with pytest.raises(SchemeError, match="known schemes are 'int8' and 'int4'"):
        Scheme(name)


def test_rows_of_another_size_are_refused():
    with pytest.raises(SchemeError, match="bits43 is for rows of 64 elements, not 96"):
        quantize_weight(gaussian(4, 96), Scheme("bits43"))
    with pytest.raises(SchemeError, match="leave out group_size"):
        Scheme("bits43", 32)


def test_an_error_in_any_component_of_a_group_costs_the_same():
    weight, moments = gaussian(200, 96, seed=1).double(), gaussian(96, 96, seed=2).double()
    metric = Metric(Gram(moments @ moments.T), Diagonal(torch.rand(200, dtype=torch.float64)))
    factors = truncated_svd(weight, 64, metric)
    left, right = even_components(factors.left, factors.right, metric)
    torch.testing.assert_close(left @ right, factors.left @ factors.right, rtol=1e-12, atol=1e-10)
    entered = metric.inputs.times_root(right)
    for group in (entered[:GROUP], entered[GROUP:]):
        size = group.square().sum() / GROUP
        torch.testing.assert_close(group @ group.T / size, torch.eye(GROUP).double(), rtol=0, atol=1e-6)
    energies = (left.square() * metric.outputs.values[:, None]).sum(0)
    for group in (energies[:GROUP], energies[GROUP:]):
        assert float(group.mean()) == pytest.approx(1.0)
        assert (group[:-1] >= group[1:] * (1 - 1e-9)).all()  # the largest first

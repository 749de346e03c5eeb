"""Integer codes: bounded error, exact packing, and rounding that knows the inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import gaussian

from lowrank.errors import WeightError
from lowrank.linalg import Scheme, dequantize_weight, quantize_weight

SCHEMES = [Scheme("int8"), Scheme("int4"), Scheme("int4", 8)]


def relative(weight, scheme, moments=None):
    decoded = dequantize_weight(*quantize_weight(weight, scheme, moments), scheme)
    return float((weight - decoded).norm() / weight.norm())


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 5), size=st.floats(1e-20, 1e20), seed=st.integers(0, 99)
)
def test_int8_is_within_half_a_step_of_every_element(rows, columns, size, seed):
    weight = gaussian(rows, 32 * columns, seed=seed) * size
    codes, scale = quantize_weight(weight, Scheme("int8"))
    assert int(codes.abs().max()) == 127
    assert ((weight - dequantize_weight(codes, scale, Scheme("int8"))).abs() <= 0.5001 * scale).all()


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.sampled_from([2, 8, 32]),
    seed=st.integers(0, 99),
)
def test_int4_codes_are_packed_and_unpacked_exactly(rows, groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, groups, size), generator=generator)
    codes[..., 0] = -8  # the largest of its group, which the scale then represents exactly
    scale = 2.0 ** torch.randint(-3, 3, (rows, groups, 1), generator=generator)
    weight = (codes * scale).flatten(1)
    assert torch.equal(
        dequantize_weight(*quantize_weight(weight, Scheme("int4", size)), Scheme("int4", size)), weight
    )


def test_errors_are_what_the_bits_allow():
    weight = gaussian(256, 256)
    assert relative(weight, Scheme("int8")) < 0.01
    assert relative(weight, Scheme("int4")) < 0.095  # plain rounding to the largest element: 0.10
    assert relative(weight, Scheme("int4", 8)) < relative(weight, Scheme("int4"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("known", ["full", "singular", "zero"])
def test_rounding_in_turn_loses_less_of_what_the_inputs_see(scheme, known):
    weight, mixing = gaussian(48, 64), gaussian(64, 64, seed=1) * torch.logspace(0, -2, 64)
    inputs = {"full": mixing, "singular": mixing[:, :5], "zero": mixing * 0}[known]
    moments = (inputs @ inputs.T).double()
    plain, in_turn = (dequantize_weight(*quantize_weight(weight, scheme, c), scheme) for c in (None, moments))
    errors = [float(((weight - w).double() @ moments * (weight - w)).sum()) for w in (plain, in_turn)]
    assert errors[1] <= (0.5 if known == "full" else 0.3) * errors[0]
    assert relative(weight, scheme, moments) < 4 * relative(weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("moments", [None, torch.eye(64, dtype=torch.float64)], ids=["plain", "in turn"])
def test_zeros_outliers_and_tiny_rows(scheme, moments):
    weight = gaussian(4, 64)
    weight[0] = 0
    weight[1] *= 1e-30
    weight[2, 5] = 1000.0
    decoded = dequantize_weight(*quantize_weight(weight, scheme, moments), scheme)
    assert torch.equal(decoded[0], weight[0])
    assert decoded[1].abs().max() <= 2 * weight[1].abs().max()
    assert decoded[2, 5] == pytest.approx(1000, rel=0.07)  # half a step of int4: 1/14
    assert decoded.isfinite().all()


def test_a_weight_may_lie_in_any_way():
    weight = gaussian(64, 96)
    for scheme in SCHEMES:
        first, second = quantize_weight(weight.T, scheme), quantize_weight(weight.T.contiguous(), scheme)
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (gaussian(4, 32) * float("nan"), r"NaN or infinite"),
        (torch.ones(4, 32, dtype=torch.int8), r"torch.int8, not floating"),
        (torch.ones(4, 32, device="meta"), r"meta device.*Load the weights"),
    ],
)
def test_bad_weights(weight, message):
    with pytest.raises(WeightError, match=message):
        quantize_weight(weight, Scheme("int8"))

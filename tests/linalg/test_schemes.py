"""Storage schemes: what they hold, and which are refused."""

import pytest
from random_tensors import gaussian

from lowrank.errors import SchemeError
from lowrank.linalg import Scheme, quantize_weight

SCHEMES = [Scheme("int8"), Scheme("int4"), Scheme("int4", 8)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_shapes_and_dtypes_are_those_that_the_scheme_says(scheme):
    codes, scale = quantize_weight(gaussian(6, 64), scheme)
    made = {"codes": (codes.shape, codes.dtype), "scale": (scale.shape, scale.dtype)}
    assert made == scheme.tensors(6, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme("int3"), r"quantize='int3': known schemes are 'int8' and 'int4'"),
        (lambda: Scheme("int8", 32), r"leave out group_size"),
        (lambda: Scheme("int4", 7), r"group_size=7: give an even number"),
        (lambda: Scheme("int4", True), r"group_size=True"),
        (
            lambda: quantize_weight(gaussian(4, 40), Scheme("int4")),
            r"rows of 40 .* groups of 32.*round_to=32",
        ),
    ],
)
def test_bad_schemes(make, message):
    with pytest.raises(SchemeError, match=message):
        make()

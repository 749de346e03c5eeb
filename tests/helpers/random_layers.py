"""Quantized layers on fixed seeds."""

import pytest
from random_tensors import gaussian
from torch import nn

from lowrank.linalg import Scheme
from lowrank.nn import QuantizedLinear
from lowrank.nn import integer_matmul as module

SCHEMES = [Scheme("int8"), Scheme("int4")]

integers = pytest.mark.skipif(not module.INTEGERS, reason="this processor has no int8 kernel")


def smoothed():
    scale, input_shift = (gaussian(64, seed=seed).abs().add(0.5).half() for seed in (1, 2))
    weight, bias = gaussian(48, 64), gaussian(48)
    corrected = nn.Parameter(bias + weight @ (input_shift.float() / scale.float()))
    made = QuantizedLinear.from_weight(
        weight, corrected, Scheme("int8"), smooth_scale=scale, input_shift=input_shift
    )
    x = gaussian(20, 64, seed=3) + input_shift.float() / scale.float()  # the mean that is taken from it
    return made, x, nn.functional.linear(x, weight, bias)

"""A quantized layer in each scheme."""

import pytest
from random_layers import SCHEMES
from random_tensors import gaussian
from torch import nn

from lowrank.nn import QuantizedLinear


@pytest.fixture(params=SCHEMES, ids=str)
def layer(request):
    return QuantizedLinear.from_weight(gaussian(48, 64), nn.Parameter(gaussian(48)), request.param).eval()

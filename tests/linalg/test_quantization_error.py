"""The error of integers is predicted without making them."""

import pytest
import torch
from corrections import INT4, INT8, gram_of
from random_tensors import gaussian64

from lowrank.linalg import (
    Gram,
    Metric,
    dequantize_weight,
    factors_quantization_error,
    quantize_weight,
    rotated,
)


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=["int4", "int8"])
def test_the_noise_of_factors_is_what_coding_them_does(scheme):
    weight, gram = gaussian64(64, 48).float(), gram_of(48)
    metric = Metric(Gram(gram))
    predicted = factors_quantization_error(weight, 16, scheme, metric, gram)
    # An oracle from the definition: code the rotated factors, measure on sampled inputs.
    from lowrank.linalg import truncated_svd

    left, right, *_ = truncated_svd(weight, 16, metric)
    low = left @ right
    left, right = rotated(left, right, seed=0)
    coded = dequantize_weight(*quantize_weight(left, scheme), scheme) @ dequantize_weight(
        *quantize_weight(right, scheme), scheme
    )
    inputs = torch.linalg.cholesky(gram).float()
    measured = float(((low - coded) @ inputs).square().sum() / (low @ inputs).square().sum())
    assert (
        0.2 * measured < predicted < 5 * measured
    )  # error feedback on one side, integer inputs on the other
    assert torch.allclose(left @ right, low, atol=1e-4)

"""A quantized weight with low-rank correction: bounds that hold whatever the rounding does."""

import pytest
import torch
from closeness import CANCELLED32, LAYERS32, ROOTS64
from corrections import INT4, INT8, gram_of
from random_tensors import gaussian64

from lowrank.errors import RankError, WeightError
from lowrank.linalg import (
    Gram,
    Metric,
    correction_error_curve,
    dequantize_weight,
    quantize_weight,
    quantize_with_correction,
    rounding_error_of,
    smooth_scale_of,
    weight_quantization_error,
)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)], ids=["wide", "tall"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_one_round_reaches_the_eckart_young_bound_of_what_the_codes_lost(shape, calibrated):
    weight, gram = gaussian64(*shape).float(), gram_of(shape[1])
    metric = Metric(Gram(gram)) if calibrated else Metric()
    found = quantize_with_correction(weight, 8, INT4, metric, gram if calibrated else None, rounds=1)
    lost = weight.double() - dequantize_weight(found.codes, found.scale, INT4).double()
    root = torch.linalg.cholesky(gram) if calibrated else torch.eye(shape[1], dtype=torch.float64)
    bound = torch.linalg.svdvals(lost @ root)[8:].norm() / (weight.double() @ root).norm()
    assert found.relative_error == pytest.approx(float(bound), rel=CANCELLED32)
    measured = ((lost - found.left.double() @ found.right.double()) @ root).norm()
    assert float(measured / (weight.double() @ root).norm()) == pytest.approx(
        found.relative_error, rel=LAYERS32
    )


def test_more_rounds_and_more_rank_never_make_it_worse():
    weight, gram = gaussian64(48, 64).float(), gram_of(64)
    metric = Metric(Gram(gram))
    errors = [
        [quantize_with_correction(weight, rank, INT4, metric, gram, rounds=n).relative_error for n in (1, 3)]
        for rank in (4, 16)
    ]
    assert errors[0][1] <= errors[0][0]
    assert errors[1][1] <= errors[1][0]
    assert errors[1][0] < errors[0][0]


def test_factors_correct_what_an_outlier_does_to_its_group():
    weight = gaussian64(32, 32).float() / 100
    weight[:, 3] += 1.0  # every group with column 3 loses its small elements
    plain = dequantize_weight(*quantize_weight(weight, INT4), INT4)
    found = quantize_with_correction(weight, 8, INT4)
    with_factors = dequantize_weight(found.codes, found.scale, INT4) + found.left @ found.right
    assert (weight - with_factors).norm() < 0.7 * (weight - plain).norm()


def test_the_spectrum_predicts_one_round_at_every_rank():
    weight, gram = gaussian64(24, 32).float(), gram_of(32)
    metric = Metric(Gram(gram))
    predicted = correction_error_curve(weight, rounding_error_of(weight, INT4, gram), metric)
    smooth_scale = smooth_scale_of(weight, gram.diagonal())
    for rank in (1, 5, 20):
        found = quantize_with_correction(
            weight, rank, INT4, metric, gram, smooth_scale=smooth_scale, rounds=1
        )
        assert found.relative_error == pytest.approx(predicted.relative_error(rank), rel=CANCELLED32)
    assert predicted.squared_norm == pytest.approx(metric.squared_norm(weight), rel=ROOTS64)


def test_int8_loses_less_than_int4():
    weight = gaussian64(64, 48).float()
    shares = [weight_quantization_error(weight, rounding_error_of(weight, s), s) for s in (INT8, INT4)]
    assert 0 < shares[0] < 0.1 * shares[1] < 0.01


def test_zeros_are_coded_exactly():
    found = quantize_with_correction(torch.zeros(16, 32), 4, INT4)
    assert found.relative_error == 0
    assert torch.isfinite(found.left @ found.right).all()
    assert dequantize_weight(found.codes, found.scale, INT4).abs().max() == 0


def test_bad_requests_are_named():
    with pytest.raises(RankError, match="from 1 to 16"):
        quantize_with_correction(torch.ones(16, 32), 17, INT4)
    with pytest.raises(WeightError, match="not whole groups"):
        quantize_with_correction(torch.ones(16, 30), 2, INT4)
    with pytest.raises(WeightError, match="NaN"):
        quantize_with_correction(torch.full((16, 32), float("nan")), 2, INT4)

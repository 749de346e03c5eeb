"""Predict what each form of storing does to each layer, from the weights and the statistics.

The solver compares these with what factorizing loses (`lowrank.allocation.candidates`); a plan that
corrects codes gets its errors from here. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from tqdm import tqdm

from lowrank.allocation.candidates import QuantizationError
from lowrank.calibration.statistics import Stats
from lowrank.errors import WeightError
from lowrank.linalg import (
    ErrorCurve,
    Scheme,
    correction_error_curve,
    factors_quantization_error,
    rounding_error_of,
    weight_quantization_error,
)
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.quantization_error import embedding_quantization_error, rows_quantization_error
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan
from lowrank.plans.storage_formats import FLOAT, INT8, StorageFormat
from lowrank.surgery.factorization import error_metric_of, input_moments, matrix_of, metric_of, weight_of
from lowrank.surgery.quantization import check_holds


@without_autocast()
def quantization_errors_of(
    model: nn.Module, drafted: Plan, forms: Sequence[StorageFormat], stats: Stats | None, progress: bool
) -> dict[StorageFormat, dict[str, QuantizationError]]:
    """Return by form what it does to the targeted layers; layers that do not fit are left out.

    Raises:
        WeightError: If a weight cannot be quantized, with the layer's name.
    """
    found: dict[StorageFormat, dict[str, QuantizationError]] = {form: {} for form in forms}
    bar = tqdm(drafted.targeted, desc="codes", unit="layer", disable=None if progress else True)
    for layer in bar:
        weight = weight_of(model.get_submodule(layer.name)).detach()
        competing = [form for form in forms if _fits(form, layer, weight)] if len(forms) > 1 else forms
        mine = [form for form in competing if form is not FLOAT]
        try:
            for form in mine:
                check_holds(form.scheme, weight)
            for form, quantization_error in _errors_of(model, layer, mine, drafted.metric, stats).items():
                found[form][layer.name] = quantization_error
        except WeightError as error:
            raise type(error)(f"{layer.name}: {error}") from error
    return found


def correction_error_curve_of(
    model: nn.Module, layer: LayerPlan, scheme: Scheme, metric: str, stats: Stats | None
) -> ErrorCurve:
    """Return the errors of one layer whose factors correct its quantized weight."""
    weight = weight_of(model.get_submodule(layer.name)).detach()
    moments = input_moments(stats, layer) if metric != "weight" else None
    lost = rounding_error_of(weight, scheme, moments)
    return correction_error_curve(weight, lost, error_metric_of(layer, weight, metric, stats))


def _fits(form: StorageFormat, layer: LayerPlan, weight: Tensor) -> bool:
    """Tell whether the layer's rows are whole groups, and in the range of the scales."""
    try:
        check_holds(form.scheme, weight)
    except WeightError:
        return False
    return form.scheme is None or layer.in_features % (form.scheme.group_size or 1) == 0


def _errors_of(
    model: nn.Module, layer: LayerPlan, forms: Sequence[StorageFormat], metric: str, stats: Stats | None
) -> dict[StorageFormat, QuantizationError]:
    """Return what each of ``forms`` does to one layer; each scheme quantizes its weight once."""
    if layer.is_embedding:
        return _errors_of_embedding(model.get_submodule(layer.name), layer, forms, metric, stats)
    weight = weight_of(model.get_submodule(layer.name)).detach()
    how = error_metric_of(layer, weight, metric, stats)
    moments = input_moments(stats, layer) if metric != "weight" else None
    schemes = dict.fromkeys(form.scheme for form in forms if form.scheme is not None)
    lost = {scheme: rounding_error_of(weight, scheme, moments) for scheme in schemes}
    found = {}
    for form in forms:
        assert form.scheme is not None
        whole = weight_quantization_error(weight, lost[form.scheme], form.scheme, how)
        if form.correction:
            found[form] = QuantizationError(
                whole, 0.0, correction_error_curve(weight, lost[form.scheme], how)
            )
            continue
        rank = layer.largest_rank_that_saves // 2 // form.rank_step * form.rank_step
        noise = factors_quantization_error(weight, rank, form.scheme, how, moments) if rank else 0.0
        found[form] = QuantizationError(whole, noise)
    return found


def _errors_of_embedding(
    table: nn.Module, layer: LayerPlan, forms: Sequence[StorageFormat], metric: str, stats: Stats | None
) -> dict[StorageFormat, QuantizationError]:
    """Return what each of ``forms`` does to a table, whose factors no form lets correct its codes."""
    how = metric_of(layer, metric, stats)
    matrix, weight = matrix_of(table, layer, how), weight_of(table).detach()
    found = {}
    for form in forms:
        assert form.scheme is not None
        factors = INT8 if form.correction else form.scheme
        step = factors.group_size or 1
        rank = layer.largest_rank_that_saves // 2 // step * step
        noise = embedding_quantization_error(matrix, rank, factors, how) if rank else 0.0
        found[form] = QuantizationError(
            rows_quantization_error(matrix, rounding_error_of(weight, form.scheme), how), noise
        )
    return found

"""Predict what each storage format does to each layer, from the weights and the statistics.

The solver compares these with what factorizing loses (`lowrank.allocation.candidates`); a plan that
corrects codes gets its errors from here. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from tqdm import tqdm

from lowrank.allocation.candidates import QuantizationLoss
from lowrank.allocation.row_widths import row_width_losses
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
from lowrank.surgery.quantization import row_moments
from lowrank.surgery.quantization_checks import check_holds


@without_autocast()
def quantization_losses_of(
    model: nn.Module, drafted: Plan, formats: Sequence[StorageFormat], stats: Stats | None, progress: bool
) -> dict[StorageFormat, dict[str, QuantizationLoss]]:
    """Return by storage format what it does to each targeted layer; layers that it does not fit are left out.

    Raises:
        WeightError: If a weight cannot be quantized, with the layer's name.
    """
    found: dict[StorageFormat, dict[str, QuantizationLoss]] = {
        storage_format: {} for storage_format in formats
    }
    bar = tqdm(drafted.targeted, desc="quantization errors", unit="layer", disable=None if progress else True)
    for layer in bar:
        weight = weight_of(model.get_submodule(layer.name)).detach()
        competing = (
            [storage_format for storage_format in formats if _fits(storage_format, layer, weight)]
            if len(formats) > 1
            else formats
        )
        mine = [storage_format for storage_format in competing if storage_format is not FLOAT]
        try:
            for storage_format in mine:
                check_holds(storage_format.scheme, weight)
            for storage_format, quantization_error in _errors_of(
                model, layer, mine, drafted.metric, stats
            ).items():
                found[storage_format][layer.name] = quantization_error
        except WeightError as error:
            raise type(error)(f"{layer.name}: {error}") from error
        if len(formats) > 1 and _only_looked_up(layer, drafted):
            how = metric_of(layer, drafted.metric, stats)
            offered = row_width_losses(model.get_submodule(layer.name), layer, how)
            for storage_format, quantization_loss in offered.items():
                found.setdefault(storage_format, {})[layer.name] = quantization_loss
    return found


def _only_looked_up(layer: LayerPlan, drafted: Plan) -> bool:
    """Tell whether nothing multiplies by an embedding: there are no kernels for unlike widths."""
    return layer.is_embedding and all(other.tied_to != layer.name for other in drafted)


def correction_error_curve_of(
    model: nn.Module, layer: LayerPlan, scheme: Scheme, metric: str, stats: Stats | None
) -> ErrorCurve:
    """Return the errors of one layer whose factors correct its quantized weight."""
    weight = weight_of(model.get_submodule(layer.name)).detach()
    moments = input_moments(stats, layer) if metric != "weight" else None
    lost = rounding_error_of(weight, scheme, moments)
    return correction_error_curve(weight, lost, error_metric_of(layer, weight, metric, stats))


def _fits(storage_format: StorageFormat, layer: LayerPlan, weight: Tensor) -> bool:
    """Tell whether the layer's rows are whole groups, and in the range of the scales."""
    try:
        check_holds(storage_format.scheme, weight)
    except WeightError:
        return False
    return storage_format.scheme is None or layer.in_features % (storage_format.scheme.group_size or 1) == 0


def _errors_of(
    model: nn.Module, layer: LayerPlan, formats: Sequence[StorageFormat], metric: str, stats: Stats | None
) -> dict[StorageFormat, QuantizationLoss]:
    """Return what each of ``formats`` does to one layer; each scheme quantizes its weight once."""
    if layer.is_embedding:
        return _errors_of_embedding(model.get_submodule(layer.name), layer, formats, metric, stats)
    weight = weight_of(model.get_submodule(layer.name)).detach()
    how = error_metric_of(layer, weight, metric, stats)
    moments = input_moments(stats, layer) if metric != "weight" else None
    schemes = dict.fromkeys(
        storage_format.scheme for storage_format in formats if storage_format.scheme is not None
    )
    lost = {scheme: rounding_error_of(weight, scheme, moments) for scheme in schemes}
    found = {}
    for storage_format in formats:
        assert storage_format.scheme is not None
        whole = weight_quantization_error(weight, lost[storage_format.scheme], storage_format.scheme, how)
        if storage_format.correction:
            found[storage_format] = QuantizationLoss(
                whole, 0.0, correction_error_curve(weight, lost[storage_format.scheme], how)
            )
            continue
        rank = layer.break_even_rank // 2 // storage_format.rank_step * storage_format.rank_step
        noise = factors_quantization_error(weight, rank, storage_format.scheme, how, moments) if rank else 0.0
        found[storage_format] = QuantizationLoss(whole, noise)
    return found


def _errors_of_embedding(
    embedding: nn.Module, layer: LayerPlan, formats: Sequence[StorageFormat], metric: str, stats: Stats | None
) -> dict[StorageFormat, QuantizationLoss]:
    """Return what each of ``formats`` does to an embedding, whose factors never correct it."""
    how, moments = metric_of(layer, metric, stats), row_moments(stats, layer.name)
    matrix, weight = matrix_of(embedding, layer, how), weight_of(embedding).detach()
    found = {}
    for storage_format in formats:
        assert storage_format.scheme is not None
        factors = INT8 if storage_format.correction else storage_format.scheme
        step = factors.group_size or 1
        rank = layer.break_even_rank // 2 // step * step
        noise = embedding_quantization_error(matrix, rank, factors, how) if rank else 0.0
        found[storage_format] = QuantizationLoss(
            rows_quantization_error(weight, matrix, storage_format.scheme, how, moments), noise
        )
    return found

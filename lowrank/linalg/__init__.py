"""The mathematics: pure functions of tensors that know nothing of modules or plans."""

from lowrank.linalg.correction import Corrected, correction_error_curve, quantize_with_correction
from lowrank.linalg.error_curve import ErrorCurve, error_curve
from lowrank.linalg.joint_error_curve import joint_error_curves
from lowrank.linalg.matmul import linear, product
from lowrank.linalg.metric import Diagonal, Gram, Identity, Metric, PulledBack, Stacked
from lowrank.linalg.mixed_widths import MixedWidths
from lowrank.linalg.quantization import (
    dequantize_scaled,
    dequantize_weight,
    quantize_scaled,
    quantize_weight,
    requantize,
    smooth_scale_of,
)
from lowrank.linalg.quantization_error import (
    factors_quantization_error,
    rounding_error_of,
    weight_quantization_error,
)
from lowrank.linalg.rotation import rotated
from lowrank.linalg.schemes import Scheme, StorageScheme, register_storage_scheme
from lowrank.linalg.shared_basis import SharedFactors, shared_basis, shared_basis_error_curves
from lowrank.linalg.svd import Factors, choose_solver, truncated_svd

__all__ = [
    "Corrected",
    "Diagonal",
    "ErrorCurve",
    "Factors",
    "Gram",
    "Identity",
    "Metric",
    "MixedWidths",
    "PulledBack",
    "Scheme",
    "SharedFactors",
    "Stacked",
    "StorageScheme",
    "choose_solver",
    "correction_error_curve",
    "dequantize_scaled",
    "dequantize_weight",
    "error_curve",
    "factors_quantization_error",
    "joint_error_curves",
    "linear",
    "product",
    "quantize_scaled",
    "quantize_weight",
    "quantize_with_correction",
    "register_storage_scheme",
    "requantize",
    "rotated",
    "rounding_error_of",
    "shared_basis",
    "shared_basis_error_curves",
    "smooth_scale_of",
    "truncated_svd",
    "weight_quantization_error",
]

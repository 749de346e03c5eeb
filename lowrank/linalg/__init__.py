"""The mathematics: pure functions of tensors that know nothing of modules or plans."""

from lowrank.linalg.correction import Corrected, coded_with_residual, residual_spectrum
from lowrank.linalg.error_curve import Spectrum, spectrum
from lowrank.linalg.joint_error_curve import joint_spectra
from lowrank.linalg.matmul import linear, product
from lowrank.linalg.metric import Diagonal, Gram, Identity, Metric, PulledBack, Stacked
from lowrank.linalg.quantization import (
    Scheme,
    decode,
    decode_smoothed,
    encode,
    encode_smoothed,
    recode,
    smoothing,
)
from lowrank.linalg.quantization_error import factors_noise, lost_by_codes, rotated, whole_noise
from lowrank.linalg.shared_basis import SharedFactors, basis_spectra, shared_basis
from lowrank.linalg.svd import Factors, choose_solver, truncated_svd

__all__ = [
    "Corrected",
    "Diagonal",
    "Factors",
    "Gram",
    "Identity",
    "Metric",
    "PulledBack",
    "Scheme",
    "SharedFactors",
    "Spectrum",
    "Stacked",
    "basis_spectra",
    "choose_solver",
    "coded_with_residual",
    "decode",
    "decode_smoothed",
    "encode",
    "encode_smoothed",
    "factors_noise",
    "joint_spectra",
    "linear",
    "lost_by_codes",
    "product",
    "recode",
    "residual_spectrum",
    "rotated",
    "shared_basis",
    "smoothing",
    "spectrum",
    "truncated_svd",
    "whole_noise",
]

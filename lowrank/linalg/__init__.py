"""The mathematics: pure functions of tensors that know nothing of modules or plans."""

from lowrank.linalg.codes import Scheme, decode, encode
from lowrank.linalg.joint import joint_spectra
from lowrank.linalg.metric import Diagonal, Gram, Identity, Metric, PulledBack, Stacked
from lowrank.linalg.products import linear, product
from lowrank.linalg.spectra import Spectrum, spectrum
from lowrank.linalg.svd import Factors, choose_solver, truncated_svd

__all__ = [
    "Diagonal",
    "Factors",
    "Gram",
    "Identity",
    "Metric",
    "PulledBack",
    "Scheme",
    "Spectrum",
    "Stacked",
    "choose_solver",
    "decode",
    "encode",
    "joint_spectra",
    "linear",
    "product",
    "spectrum",
    "truncated_svd",
]

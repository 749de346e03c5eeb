"""The mathematics: pure functions of tensors that know nothing of modules or plans."""

from lowrank.linalg.metric import Identity, Inputs, Metric
from lowrank.linalg.spectra import Spectrum, spectrum
from lowrank.linalg.svd import Factors, choose_solver, truncated_svd

__all__ = [
    "Factors",
    "Identity",
    "Inputs",
    "Metric",
    "Spectrum",
    "choose_solver",
    "spectrum",
    "truncated_svd",
]

"""A weight, the moments of its inputs, and the schemes that its correction is tested with."""

import torch
from random_tensors import gaussian64

from lowrank.linalg import Scheme

INT4, INT8 = Scheme("int4", 16), Scheme("int8")


def gram_of(features, seed=1):
    factor = (
        gaussian64(features, 2 * features, seed=seed)
        * torch.linspace(0.1, 3, features, dtype=torch.float64)[:, None]
    )
    return factor @ factor.T

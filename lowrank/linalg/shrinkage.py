"""Second moments that were estimated from few samples, brought nearer to what they are of."""

from __future__ import annotations

import torch
from torch import Tensor


def shrunk(matrix: Tensor, samples: float) -> Tensor:
    """Shrink a second moment estimated from few ``samples`` towards its diagonal, by `shrinkage`.

    Shrinking to the diagonal, and not to the identity, respects features whose scales differ by orders of
    magnitude.
    """
    amount = shrinkage(matrix, samples)
    return matrix * (1 - amount) + torch.diag(amount * matrix.diagonal()) if amount else matrix


def shrinkage(matrix: Tensor, samples: float) -> float:
    """Return the share of its diagonal that a second moment estimated from few ``samples`` should get.

    With fewer samples than features some directions were never seen, but not because they do not
    exist. The amount is the oracle-approximating one for the correlation matrix; it vanishes as one
    over the samples.

    Source: Chen, Wiesel, Eldar & Hero 2010 (OAS, arXiv:0907.4698), with the diagonal as the target.
    """
    size = len(matrix)
    scale = matrix.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)
    features = float((scale > 0).sum())  # the trace of the correlation matrix
    squares = float((matrix * inverse[:, None] * inverse).square().sum())
    spread = squares - features**2 / max(1.0, features)
    if size < 2 or spread <= 0 or samples <= 0:
        return 0.0
    amount = ((1 - 2 / size) * squares + features**2) / ((samples + 1 - 2 / size) * spread)
    return min(1.0, max(0.0, amount))

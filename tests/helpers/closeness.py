"""How close outputs are, with their scale."""

from torch import Tensor


def agreement(found: Tensor, expected: Tensor) -> float:
    """Return one less half of the squared relative error, a mean over rows.

    Where both rows have one norm that is their cosine; where they have not, it is less. A cosine alone
    would not see outputs that are twice as large as they should be.
    """
    error = (found - expected).flatten(0, -2).double().square().sum(-1)
    norm = expected.flatten(0, -2).double().square().sum(-1)
    return float((1 - error / (2 * norm)).mean())

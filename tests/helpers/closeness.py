"""How close outputs are, with their scale; and where the tolerances of the tests come from."""

from torch import Tensor

FEW32 = 1e-6
"""A few float32 operations: some ten times their rounding, 6e-8."""

SUMS32 = 1e-5
"""A float32 sum of up to a thousand products, in another order: their rounding adds up as its root does."""

LAYERS32 = 1e-4
"""Several such sums, one after the other, as in a model of a few layers."""

CANCELLED32 = 1e-3
"""What is left of float32 numbers that nearly cancel: the error of factors, a gradient, a centred moment."""

SUMS64 = 1e-9
"""float64 sums and decompositions of these sizes, by another algorithm; the rounding is 1e-16."""

ROOTS64 = 1e-6
"""Errors that are known by their squares in float64: of a relative 1e-12 there, the root is left."""


def agreement(found: Tensor, expected: Tensor) -> float:
    """Return one less half of the squared relative error, a mean over rows.

    Where both rows have one norm that is their cosine; where they have not, it is less. A cosine alone
    would not see outputs that are twice as large as they should be.
    """
    error = (found - expected).flatten(0, -2).double().square().sum(-1)
    norm = expected.flatten(0, -2).double().square().sum(-1)
    return float((1 - error / (2 * norm)).mean())

"""What "error" means: a metric is a value that says how to weigh the inputs of a layer.

Every factorization minimises ``‖(W − LR) C^½‖_F``. A metric only has to weigh a matrix by ``C``,
on the input side or, for the outputs' Gram matrix, from both sides. With ``C = I`` it is the
truncated SVD (Eckart & Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Metric(Protocol):
    """How the error of a factorization is measured."""

    def weigh(self, weight: Tensor) -> Tensor:
        """Return ``W S`` with ``S Sᵀ = C``, shape ``(out, in)``: its Frobenius norm is the metric's."""
        ...

    def output_gram(self, weight: Tensor) -> Tensor:
        """Return ``W C Wᵀ``, shape ``(out, out)``."""
        ...


@dataclass(frozen=True)
class Identity:
    """Every input direction counts the same: the truncated SVD of the weight itself."""

    def weigh(self, weight: Tensor) -> Tensor:
        """Return the weight as it is, shape ``(out, in)``."""
        return weight

    def output_gram(self, weight: Tensor) -> Tensor:
        """Return ``W Wᵀ``, shape ``(out, out)``."""
        return gram(weight)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Input directions count by how much of the calibration data lies along them.

    Args:
        second_moment: ``C = E[xxᵀ]``, centred or not, ``(in, in)``, positive semi-definite. It may
            be singular, since nothing is inverted.

    Source: DRONE (Chen et al., 2021); the optimum of SVD-LLM (Wang et al., 2024, arXiv:2403.07378).
    """

    second_moment: Tensor

    def weigh(self, weight: Tensor) -> Tensor:
        """Return ``W E λ^½`` with ``C = E λ Eᵀ``, shape ``(out, in)``."""
        values, vectors = torch.linalg.eigh(self.second_moment.to(weight))
        return weight @ (vectors * values.clamp(min=0).sqrt())

    def output_gram(self, weight: Tensor) -> Tensor:
        """Return ``W C Wᵀ``, shape ``(out, out)``."""
        product = weight @ self.second_moment.to(weight) @ weight.T
        return (product + product.T) / 2


def gram(matrix: Tensor, block: int = 192) -> Tensor:
    """Return ``M Mᵀ``, computing the blocks of the lower triangle only.

    Args:
        matrix: Shape ``(rows, columns)``.
        block: Rows computed at a time; at 192 a matrix product is as fast per operation as a large
            one, and five eighths of the products of a 768-row matrix suffice.

    Returns:
        Shape ``(rows, rows)``, in the dtype of ``matrix``.
    """
    rows = matrix.shape[0]
    result = matrix.new_empty(rows, rows)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        torch.mm(matrix[start:stop], matrix[:stop].T, out=result[start:stop, :stop])
        result[:start, start:stop] = result[start:stop, :start].T
    return result

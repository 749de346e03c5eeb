r"""Fewer inputs of a layer: in which order they go, the error at every width, what the others take over.

A neuron of a feed-forward block is an input of the layer that reads the block's hidden features. Without the
inputs ``R``, the columns ``S`` that remain are fitted anew, ``W' = W_S + W_R C_RS C_SS⁻¹``, and the error is

    tr(G ΔW C ΔWᵀ) = tr((Wᵀ G W)_RR ((C⁻¹)_RR)⁻¹)

so that the outputs' metric decides which neurons go, but not what the others become.

Source: Hassibi & Stork 1993 (Optimal Brain Surgeon); Kurtić et al. 2023 (ZipLM, arXiv:2302.04089), there with
``G = I`` and for whole structures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import RankError
from lowrank.linalg.error_curve import ErrorCurve
from lowrank.linalg.metric import Metric, Side
from lowrank.linalg.svd import checked_weight

DAMPING = 1e-8
"""Share of its own variance that every neuron gets. It tells copies apart, and is far below the resolution of
a float32 weight, whose errors are known to about 1e-7 of the norm."""

AT_ONCE = 64
"""Neurons that go between two updates of the whole matrices, which are then matrix products."""

POOL = 256
"""Neurons with the least errors, among which the next `AT_ONCE` are chosen one by one."""


@dataclass(frozen=True, eq=False)
class NeuronRemoval:
    """In which order neurons go, and what that costs.

    Args:
        order: Shape ``(in,)``, int64: the neurons, first the one that goes first.
        errors: The squared error at every width: ``errors.tail[k]`` with ``k`` neurons left.
    """

    order: Tensor
    errors: ErrorCurve

    def kept(self, width: int) -> Tensor:
        """Return the ``width`` neurons that remain, in their old order.

        Raises:
            RankError: If ``width`` is outside ``1 .. in``.
        """
        if not 1 <= width <= len(self.order):
            raise RankError(f"width={width} is outside 1 .. {len(self.order)}, the neurons that there are.")
        return self.order[len(self.order) - width :].sort().values


def neuron_removal(weight: Tensor, metric: Metric) -> NeuronRemoval:
    """Order the inputs of ``weight`` by what their removal costs, given those that went before.

    The least increase of ``tr(G ΔW C ΔWᵀ)`` comes first, `AT_ONCE` neurons from a pool of the `POOL` cheapest
    at a time. The errors are exact for the order, each of weights that were fitted anew by `refitted`.

    Args:
        weight: Shape ``(out, in)``, any floating dtype.
        metric: What the error measures; its inputs' side is ``C``, to which `DAMPING` is added.

    Returns:
        Order and errors, on the CPU.

    Raises:
        WeightError: If the weight is not a finite floating-point matrix.
        StatsError: If the metric is not finite.

    Example:
        >>> removal = neuron_removal(torch.tensor([[3.0, 0.0, 1.0]]), Metric())
        >>> removal.order.tolist(), removal.errors.tail.round(decimals=6).tolist()
        ([1, 2, 0], [10.0, 1.0, 0.0, 0.0])
    """
    matrix, scale = checked_weight(weight, metric.plain)
    matrix = matrix.to(torch.float64)
    moments, deviations = _correlation(metric.inputs, matrix)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))  # C⁻¹
    pulled = deviations[:, None] * metric.outputs.pull_back(matrix) * deviations  # Wᵀ G W
    left = torch.arange(len(moments), device=matrix.device)
    order, steps = [], []
    while len(left):
        chosen, errors = _next(pulled, inverse)
        order.append(left[chosen])
        steps.append(errors)
        remain = torch.ones(len(left), dtype=torch.bool, device=left.device)
        remain[chosen] = False
        pulled, inverse = _without(pulled, inverse, chosen, remain)
        left = left[remain]
    lost = torch.cat(steps).clamp(min=0).cumsum(0).flip(0).cpu()
    return NeuronRemoval(torch.cat(order).cpu(), ErrorCurve(torch.cat([lost, lost.new_zeros(1)]), scale))


def refitted(weight: Tensor, kept: Tensor, inputs: Side) -> Tensor:
    """Return the columns of ``weight`` for the ``kept`` inputs, which take over from the others.

    Args:
        weight: ``W (out, in)``.
        kept: ``S``, the inputs that remain, int64, increasing.
        inputs: ``C``; `DAMPING` is added to it as in `neuron_removal`.

    Returns:
        ``W_S + W_R C_RS C_SS⁻¹ (out, len(kept))``, float64.
    """
    matrix = weight.detach().to(torch.float64)
    kept = kept.to(matrix.device)
    moments, deviations = _correlation(inputs, matrix)
    scaled = matrix * deviations  # (out, in)
    gone = torch.ones(len(moments), dtype=torch.bool, device=matrix.device)
    gone[kept] = False
    root = torch.linalg.cholesky(moments[kept][:, kept])
    taken = torch.cholesky_solve(moments[kept][:, gone] @ scaled[:, gone].T, root).T  # (out, len(kept))
    live = deviations[kept]
    return matrix[:, kept] + torch.where(live > 0, taken / torch.where(live > 0, live, 1.0), 0.0)


def _correlation(inputs: Side, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``C`` for inputs of variance one, damped, and the deviations of the inputs, ``(in,)``.

    Inputs that are always zero have a deviation of zero, and nothing in common with others.
    """
    moments = inputs.times(torch.eye(like.shape[1], dtype=like.dtype, device=like.device))
    moments = (moments + moments.T) / 2
    deviations = moments.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(deviations > 0, 1 / torch.where(deviations > 0, deviations, 1.0), 0.0)
    moments = inverse[:, None] * moments * inverse
    dead = (deviations == 0).to(moments)
    added = DAMPING
    while True:  # more only where rounding has left a negative eigenvalue
        damped = moments + torch.diag(added + dead)
        if not int(torch.linalg.cholesky_ex(damped).info):
            return damped, deviations
        added *= 10


def _next(pulled: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next neurons to go, in order, and by how much each raises the error."""
    scores = pulled.diagonal() / inverse.diagonal()
    pool = scores.topk(min(POOL, len(scores)), largest=False).indices
    pulled, inverse = pulled[pool][:, pool], inverse[pool][:, pool]
    alive = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    chosen, errors = [], []
    for _ in range(min(AT_ONCE, len(pool))):
        own = torch.where(alive, inverse.diagonal(), 1.0)
        scores = torch.where(alive, pulled.diagonal() / own, torch.inf)
        one = int(scores.argmin())
        chosen.append(one)
        errors.append(scores[one])
        step = inverse[one] / inverse[one, one]  # what the others take over of this one
        column, corner = pulled[:, one].clone(), pulled[one, one].clone()
        pulled = pulled - torch.outer(column, step) - torch.outer(step, column)
        pulled = pulled + corner * torch.outer(step, step)
        inverse = inverse - torch.outer(step, inverse[one])
        alive[one] = False
    return pool[torch.tensor(chosen, device=pool.device)], torch.stack(errors)


def _without(pulled: Tensor, inverse: Tensor, gone: Tensor, remain: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``WᵀGW`` and ``C⁻¹`` of the neurons that remain, after these took over from those gone."""
    root = torch.linalg.cholesky(inverse[gone][:, gone])
    across = inverse[remain][:, gone]  # (remaining, gone)
    step = torch.cholesky_solve(across.T, root).T
    between = pulled[remain][:, gone]
    kept = pulled[remain][:, remain] - between @ step.T - step @ between.T
    kept = kept + step @ pulled[gone][:, gone] @ step.T
    return (kept + kept.T) / 2, inverse[remain][:, remain] - step @ across.T

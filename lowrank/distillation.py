"""How far a compressed model is from its teacher: outputs and hidden states, as one differentiable number.

Source: Hinton et al. 2015 (arXiv:1503.02531) for the outputs; Sun et al. 2019 (Patient Knowledge
Distillation, arXiv:1908.09355) for the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Batch
from lowrank.errors import DataError
from lowrank.objectives import pooled


def distance(
    outputs: Any,
    targets: Any,
    batch: Batch,
    hidden: Mapping[str, Tensor],
    target_hidden: Mapping[str, Tensor],
    hidden_weight: float = 1.0,
) -> Tensor:
    """Return the distance of ``outputs`` to ``targets`` plus that of the blocks' hidden states.

    Args:
        outputs: What the student returned: with logits, the KL divergence per term counts; without,
            the relative squared error, and one minus the cosine of the pooled embedding.
        targets: What the teacher returned for the same batch.
        batch: Its mask leaves padding out.
        hidden: The student's hidden states by block.
        target_hidden: The teacher's.
        hidden_weight: How often the mean over blocks of their relative squared error counts.

    Raises:
        DataError: If the two models return different things.
    """
    total = _of_outputs(outputs, targets, batch)
    names = hidden.keys() & target_hidden.keys()
    if names and hidden_weight:
        parts = [relative_squares(batch.real(hidden[n]), batch.real(target_hidden[n])) for n in sorted(names)]
        total = total + hidden_weight * torch.stack(parts).mean()
    return total


def _of_outputs(outputs: Any, targets: Any, batch: Batch) -> Tensor:
    mine, its = _named(outputs), _named(targets)
    logits = [key for key in its if key.endswith("logits")]
    keys = logits or [key for key in its if key == "last_hidden_state"] or list(its)[:1]
    parts = []
    for key in keys:
        if key not in mine or mine[key].shape != its[key].shape:
            got = tuple(mine[key].shape) if key in mine else "nothing"
            raise DataError(
                f"The teacher returns {key} of shape {tuple(its[key].shape)}, the compressed model {got}. "
                "Give the dense model that it was made from."
            )
        parts.append(_part(key, mine[key], its[key], batch))
    if not parts:
        raise DataError(
            f"The teacher returns {type(targets).__name__}, in which there is no tensor to match."
        )
    return torch.stack(parts).sum()


def _part(key: str, mine: Tensor, target: Tensor, batch: Batch) -> Tensor:
    if key.endswith("logits") and target.shape[-1] > 1:
        return divergence(batch.real(mine), batch.real(target))
    squares = relative_squares(batch.real(mine), batch.real(target))
    if key == "last_hidden_state" and target.ndim == 3:
        cosine = (pooled(mine.float(), batch.mask) * pooled(target.float(), batch.mask)).sum(-1)
        return squares + (1 - cosine).mean()
    return squares


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean ``KL(teacher ‖ student)`` over rows of logits ``(terms, classes)``."""
    return nn.functional.kl_div(
        logits.float().log_softmax(-1),
        targets.float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def relative_squares(mine: Tensor, target: Tensor) -> Tensor:
    """Return the mean of ``‖x − t‖² / ‖t‖²`` over rows ``(terms, features)``.

    Row by row, since in language models the first token's hidden state can be a hundred times as large
    as the others, and would drown them.
    """
    target = target.float()
    tiny = torch.finfo(torch.float32).tiny
    return ((mine.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=tiny)).mean()


def _named(outputs: Any) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    return {
        str(key): value for key, value in items if isinstance(value, Tensor) and value.is_floating_point()
    }

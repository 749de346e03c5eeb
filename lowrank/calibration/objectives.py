"""Scalars whose gradients tell how much each output of a layer matters, without labels.

A model with class or token logits is asked for its own predictions: labels are sampled from them, so
that ``E[ggᵀ]`` is the Fisher information, the curvature of the KL divergence to the dense model. An
encoder gets random probes through its pooled, normalised output: the Gauss–Newton matrix of the
embedding's squared error. Any other output gets random probes itself.

Source: Martens 2020, "New insights and perspectives on the natural gradient method" (arXiv:1412.1193).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.arguments import accepts, function, instance, optional
from lowrank.calibration.data import Batch
from lowrank.errors import DataError


class Objective(NamedTuple):
    """A sum over independent terms, each a sample or a token."""

    total: Tensor
    terms: int


_BATCH = instance(Batch, "a Batch, from lowrank.calibration.data", DataError)


@accepts(batch=_BATCH, generator=optional(instance(torch.Generator, "a torch.Generator", DataError)))
def self_supervised(outputs: Any, batch: Batch, generator: torch.Generator) -> Objective:
    """Return the default objective for what the model returned."""
    meaning, tensors = _looked_at(outputs, batch)
    if meaning == "logits":
        parts = [_sampled_labels(logits, generator) for logits in tensors]
        return Objective(torch.stack([part.total for part in parts]).sum(), parts[0].terms)
    return _probed(tensors[0], generator)


@accepts(batch=_BATCH)
def increase(outputs: Any, targets: Any, batch: Batch) -> Objective:
    """Return by how much the objective of `self_supervised` is larger than the dense model's.

    It is what the metric ``"loss"`` predicts to second order: the KL divergence to the dense model's
    predictions, or half the squared error of the embedding or output.

    Raises:
        DataError: If no objective can be made of them, or they have different shapes.
    """
    meaning, mine = _looked_at(outputs, batch)
    _, its = _looked_at(targets, batch)
    shapes, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (mine, its))
    if shapes != wanted:
        raise DataError(
            f"Batch {batch.index}: the model's outputs have shapes {shapes}, the dense model's targets "
            f"{wanted}. Give the dense model that it was made from."
        )
    if meaning == "logits":
        parts = [
            nn.functional.kl_div(
                x.float().log_softmax(-1), t.float().log_softmax(-1), reduction="sum", log_target=True
            )
            for x, t in zip(mine, its, strict=True)
        ]
        return Objective(torch.stack(parts).sum(), len(its[0]))
    return Objective(0.5 * (mine[0].float() - its[0].float()).square().sum(), len(its[0]))


def _looked_at(outputs: Any, batch: Batch) -> tuple[str, list[Tensor]]:
    """Return the kind of the outputs, and their rows ``(terms, features)``."""
    named = outputs if isinstance(outputs, Mapping) else {}
    logits = [value for key, value in named.items() if key.endswith("logits") and isinstance(value, Tensor)]
    if logits and all(value.shape[-1] > 1 for value in logits):
        return "logits", [batch.real(value) for value in logits]
    if "last_hidden_state" in named and named["last_hidden_state"].ndim == 3:
        return "embedding", [pooled(named["last_hidden_state"], batch.mask)]
    tensor = logits[0] if logits else _first_tensor(outputs)
    if tensor is None or not tensor.is_floating_point():
        raise DataError(
            f"The model returns {type(outputs).__name__}, of which no objective can be made. "
            "Pass loss=function(outputs, batch), or loss=None to do without gradients."
        )
    if not tensor.ndim:
        raise DataError(
            f"Batch {batch.index}: the model returns one number, of which no objective can be made: outputs "
            "have a dimension of samples. Pass loss=function(outputs, batch), or loss=None."
        )
    if not tensor.numel():
        raise DataError(
            f"Batch {batch.index}: the model returns a tensor of shape {tuple(tensor.shape)}, without "
            "elements. Leave the batch out."
        )
    return "output", [tensor.reshape(len(tensor), -1)]


@accepts(loss=function, batch=_BATCH)
def of_loss(loss: Callable[[Any, Any], Any], outputs: Any, batch: Batch) -> Objective:
    """Return the user's loss, a mean over the batch's samples, as a sum over them.

    Raises:
        DataError: If it is not a scalar, or does not depend on the model's outputs.
    """
    value = loss(outputs, batch.given)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"Batch {batch.index}: the loss is {got}, but must be a tensor with one element.")
    if not value.requires_grad:
        raise DataError(
            f"Batch {batch.index}: the loss does not depend on any linear layer by a gradient. "
            "Compute it from the model's outputs, without detach() or no_grad()."
        )
    first = next((v for v in (*batch.arguments, *batch.keywords.values()) if isinstance(v, Tensor)), None)
    samples = len(first) if first is not None and first.ndim else 1
    return Objective(value.reshape(()) * samples, samples)


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the normalised mean over real tokens: ``(batch, tokens, features)`` to ``(batch, features)``.

    Raises:
        DataError: If there is not one value of the mask for each hidden state.
    """
    if mask is None:
        return nn.functional.normalize(hidden.mean(1), dim=-1)
    if mask.shape != hidden.shape[:2]:
        raise DataError(
            f"The attention mask has the shape {tuple(mask.shape)}, and the model's hidden states "
            f"have {tuple(hidden.shape)}: not one value for each. Pass loss=None, or leave out the mask."
        )
    weights = mask[..., None].to(hidden)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def _sampled_labels(logits: Tensor, generator: torch.Generator) -> Objective:
    """Return the cross-entropy of labels drawn from ``logits (terms, classes)`` themselves."""
    logits = logits.float()
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return Objective(nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels))


def _probed(outputs: Tensor, generator: torch.Generator) -> Objective:
    """Return the sum of random projections of ``outputs (samples, features)``."""
    probes = torch.randn(outputs.shape, generator=generator, device=outputs.device)
    return Objective((outputs.float() * probes).sum(), len(outputs))


def _first_tensor(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    if not isinstance(outputs, (Mapping, tuple, list)):
        return None
    return next((value for value in values if isinstance(value, Tensor)), None)

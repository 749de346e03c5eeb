"""How far a compressed model is from its teacher: outputs and hidden states, as one differentiable number.

Source: Hinton et al. 2015 (arXiv:1503.02531) for the outputs; Sun et al. 2019 (Patient Knowledge
Distillation, arXiv:1908.09355) for the hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.data import Batch, moved
from lowrank.calibration.objectives import pooled
from lowrank.errors import DataError
from lowrank.inspection.blocks import find_blocks, output_of, outputs_of
from lowrank.inspection.contexts import eval_mode
from lowrank.inspection.devices import device_of


def distance(
    outputs: Any,
    targets: Any,
    batch: Batch,
    hidden: Mapping[int, Tensor],
    target_hidden: Mapping[int, Tensor],
    hidden_weight: float = 1.0,
) -> Tensor:
    """Return the distance of ``outputs`` to ``targets`` plus that of the blocks' hidden states.

    Args:
        outputs: What the student returned: with logits, the KL divergence per term counts; without,
            the relative squared error, and one minus the cosine of the pooled embedding.
        targets: What the teacher returned for the same batch.
        batch: Its mask leaves padding out.
        hidden: The student's hidden states, by the position of the block.
        target_hidden: The teacher's.
        hidden_weight: How often the mean over blocks of their relative squared error counts.

    Raises:
        DataError: If the two models return different things.
    """
    total = _of_outputs(outputs, targets, batch)
    names = hidden.keys() & target_hidden.keys()
    if names and hidden_weight:
        if hidden.keys() != target_hidden.keys() or any(
            hidden[n].shape != target_hidden[n].shape for n in names
        ):
            raise DataError(
                f"The teacher has {len(target_hidden)} blocks and the compressed model {len(hidden)}, or "
                "their hidden states differ in shape. Give the dense model that it was made from."
            )
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
        if not its[key].numel():
            raise DataError(
                f"Batch {batch.index}: {key} of shape {tuple(its[key].shape)} has no elements to match."
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
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    elif isinstance(outputs, Tensor):
        named = {"output": outputs}
    else:
        named = dict(enumerate(outputs)) if isinstance(outputs, (tuple, list)) else {}
    return {str(k): v for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()}


class DistillationLoss:
    """Shows one batch to teacher and student, and tells how far apart they are.

    For a training loop of your own, also under `torch.nn.parallel.DistributedDataParallel` (pass the
    wrapped model to `outputs_and_distance`).

    Args:
        model: The compressed model.
        teacher: The dense model that it was made from, on any device.
        hidden_weight: How much the blocks' hidden states count beside the outputs.
        autocast: The precision in which both run; by default what surrounds the call.

    Example:
        >>> import copy, lowrank
        >>> from lowrank.calibration.data import as_batch
        >>> teacher = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> model = lowrank.compress(copy.deepcopy(teacher), rank=8)
        >>> distillation_loss = DistillationLoss(model, teacher)
        >>> with distillation_loss.listening():
        ...     loss = distillation_loss.distance(as_batch(torch.randn(4, 64)))
        >>> loss.requires_grad
        True
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        hidden_weight: float = 1.0,
        autocast: torch.autocast | None = None,
    ) -> None:
        self._model, self._teacher, self._hidden_weight = model, teacher, hidden_weight
        self._autocast = autocast if autocast is not None else contextlib.nullcontext()
        self._home = device_of(model)
        self._device = device_of(teacher)
        self._found: dict[int, Tensor] = {}
        self._wanted: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the hidden states of both models, with the teacher in eval mode."""
        blocks, its = (find_blocks(m) if self._hidden_weight else {} for m in (self._model, self._teacher))
        with (
            eval_mode(self._teacher),
            outputs_of(blocks.values()) as self._found,
            outputs_of(its.values()) as self._wanted,
        ):
            yield

    def distance(self, batch: Batch) -> Tensor:
        """Return the distance on one batch, with a graph where gradients are enabled."""
        return self.outputs_and_distance(batch, self._model)[1]

    def outputs_and_distance(self, batch: Batch, model: nn.Module) -> tuple[Any, Tensor]:
        """Return what ``model``, the student or a wrapper of it, made of the batch, and the distance."""
        with self._autocast:
            with torch.no_grad():
                targets = moved(batch.on(self._device).call(self._teacher), self._home)
                wanted = moved(self._wanted, self._home)
            outputs = batch.call(model)
        return outputs, distance(outputs, targets, batch, self._found, wanted, self._hidden_weight)

    def block_distance(self, name: str, batch: Batch) -> Tensor:
        """Return the relative squared error of one block's hidden states.

        The student's block reads what the student's blocks before it make of the batch, without a graph.

        Raises:
            DataError: If the teacher's hidden states have another shape.
        """
        mine, its = (model.get_submodule(name) for model in (self._model, self._teacher))
        with self._autocast:
            with torch.no_grad():
                there = batch.on(self._device)
                target = output_of(name, its, lambda: there.call(self._teacher))
            hidden = output_of(name, mine, lambda: batch.call(self._model))
        if hidden.shape != target.shape:
            raise DataError(
                f"{name} of the teacher returns {tuple(target.shape)}, of the compressed model "
                f"{tuple(hidden.shape)}. Give the dense model that it was made from."
            )
        return relative_squares(batch.real(hidden), batch.real(moved(target, self._home)))

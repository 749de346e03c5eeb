"""Recovery with transformers' `Trainer`, for those who want its logging, checkpoints and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from lowrank.calibration.data import Batch, as_batch
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.recovery import trainable


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` whose loss is the distance to a teacher, as in `lowrank.recover`.

    Only factors, biases and norms are trained: everything else is frozen when the trainer is made, and
    stays so.

    Args:
        *args: As for `transformers.Trainer`; the model is the compressed one.
        teacher: The dense model that it was made from.
        hidden_weight: How much hidden states count beside the outputs.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *args: Any, teacher: nn.Module, hidden_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lesson = DistillationLoss(self.model, teacher.to(self.args.device), hidden_weight)
        chosen = {id(parameter) for parameter in trainable(self.model)}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the distance to the teacher on one batch."""
        batch: Batch = as_batch(dict(inputs))
        with self._lesson.listening():
            outputs, value = self._lesson.outputs_and_distance(batch, model)
        return (value, outputs) if return_outputs else value

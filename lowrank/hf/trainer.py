"""Recovery with transformers' `Trainer`, for those who want its logging, checkpoints and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from lowrank.calibration.data import Batch, as_batch
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.recovery import trainable
from lowrank.distillation.trainer import Best


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` whose loss is the distance to a teacher, as in `lowrank.recover`.

    Only factors, biases and norms are trained: everything else is frozen when the trainer is made, and
    stays so. With an ``eval_dataset`` the model ends in its best state on that, perhaps the one that it came
    in; it is looked at before training, after it, and as often as ``eval_strategy`` says.

    Args:
        *args: As for `transformers.Trainer`; the model is the compressed one.
        teacher: The dense model that it was made from.
        hidden_weight: How much hidden states count beside the outputs.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *args: Any, teacher: nn.Module, hidden_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._distillation_loss = DistillationLoss(self.model, teacher.to(self.args.device), hidden_weight)
        self._trained_parameters = trainable(self.model, teacher)
        self._best_state: Best | None = None
        chosen = {id(parameter) for parameter in self._trained_parameters}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the best state on the ``eval_dataset`` if there is one, whatever happens."""
        if self.eval_dataset is None:
            return super().train(*args, **kwargs)
        self._best_state = Best(self._trained_parameters, self.evaluate()["eval_loss"])
        try:
            done = super().train(*args, **kwargs)
            self.evaluate()
            return done
        finally:
            self._best_state.restore()
            self._best_state = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the metrics, and remember the parameters if the distance is the smallest so far."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self._best_state is not None and "eval_loss" in metrics:
            self._best_state.offer(metrics["eval_loss"])
        return metrics

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the distance to the teacher on one batch."""
        batch: Batch = as_batch(dict(inputs))
        with self._distillation_loss.listening():
            outputs, value = self._distillation_loss.outputs_and_distance(batch, model)
        return (value, outputs) if return_outputs else value

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Return the distance on one batch of the ``eval_dataset``; it needs no labels."""
        with torch.no_grad():
            value = self.compute_loss(model, self._prepare_inputs(inputs))
        assert isinstance(value, Tensor)
        return value.detach(), None, None

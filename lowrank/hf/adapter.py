"""The answers of transformers models to what everyone asks of a model; importing this file registers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowrank.adapter import Adapter, register_adapter
from lowrank.hf import models
from lowrank.hf.tokenizer import check_tokenizer
from lowrank.inspection.inspection import Inspection
from lowrank.plans.plan import Plan


class TransformersAdapter(Adapter):
    """What transformers says of its models; plain modules are answered for as without it."""

    def heads(self, seen: Inspection) -> Mapping[str, str]:
        """Return the layers outside the base model of a model with a head."""
        return models.head_layers(seen) if models.is_pretrained(seen.model) else super().heads(seen)

    def separately_saved(self, model: nn.Module) -> Sequence[str]:
        """Name the transformers models inside ``model``, each of which may be saved alone."""
        return models.parts(model)

    def check_unquantized(self, model: nn.Module) -> None:
        """Refuse a model whose config names another method of quantization."""
        models.check_unquantized(model)

    def check_tokenizer(self, model: nn.Module, tokenizer: Any) -> None:
        """Refuse a tokenizer that knows far fewer tokens than the model."""
        check_tokenizer(model, tokenizer)

    def recorded(self, model: nn.Module) -> Plan | None:
        """Return the plan that the model's config holds."""
        return models.recorded(model)

    def record(self, model: nn.Module, plan: Plan | None = None) -> None:
        """Write into the configs what is compressed, and fit the ties."""
        models.record(model, plan)

    def saves(self, model: nn.Module) -> bool:
        """Tell whether ``save_pretrained`` writes the model."""
        return models.is_pretrained(model)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the model by its own ``save_pretrained``, with digests and a card."""
        models.save(model, folder)

    def saved_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint under the names that ``save_pretrained`` uses."""
        return models.saved_tensors(model) if models.is_pretrained(model) else super().saved_tensors(model)


register_adapter(TransformersAdapter())

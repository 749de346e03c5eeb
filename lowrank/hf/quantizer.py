"""`LowRankQuantizer`: carries a `LowRankConfig` through ``from_pretrained``, in both directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers import HfQuantizer, register_quantizer

from lowrank.errors import CheckpointError, PlanError
from lowrank.files.safetensors_header import read_header
from lowrank.files.state_dict import align
from lowrank.hf.checks import (
    OWN,
    check_complete,
    check_loaded_values,
    check_names_and_dtypes,
    check_shapes,
)
from lowrank.hf.config import METHOD, LowRankConfig
from lowrank.hf.models import record
from lowrank.hf.ties import rewrite_ties, with_tied_heads
from lowrank.hf.tokenizer import check_tokenizer as check_tokenizer
from lowrank.pipeline.compress import compress
from lowrank.plans.plan import Plan
from lowrank.surgery.quantization_checks import FACTORS
from lowrank.surgery.replacement import restructure

LARGEST_TO_ALIGN = 2**20
"""Bytes. transformers maps files into memory: to copy larger tensors would double what loading needs."""


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Carries a `LowRankConfig` through ``from_pretrained``; the model keeps nothing of it."""

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config, files = self.quantization_config, checkpoint_files or []
        if not self.pre_quantized:
            config.budget  # noqa: B018 - raises where there is none
            return
        plan = config.carried_out()
        self._headers = {file: read_header(file) for file in files}
        if files and config.verify is not False:
            config.check(self._headers)
        check_shapes(self._headers, plan)
        self._plan = with_tied_heads(model, _localized(plan, model))
        try:
            restructure(model, self._plan)
        except PlanError as error:
            raise CheckpointError(f"config.json does not fit the architecture: {error}") from error
        rewrite_ties(model)
        for module in model.modules():
            if isinstance(module, OWN):  # some models initialise whatever is called Linear
                module._is_hf_initialized = True  # type: ignore[assignment]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Check the files against the model: only here transformers tells which names it will translate."""
        if self.pre_quantized:
            check_names_and_dtypes(self._headers, weight_conversions, model)
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Factors are ordinary parameters: .half(), Trainer and save_pretrained must not see a
        # quantized model. The config alone remembers.
        self.remove_quantization_config(model)
        if self.pre_quantized:
            check_complete(model)
            check_loaded_values(model)
            tensors = (*model.parameters(), *model.buffers())
            align(tensor for tensor in tensors if tensor.nbytes <= LARGEST_TO_ALIGN)
            record(model, self._plan)
        else:
            compress(model, self.quantization_config.config)

    def is_serializable(self) -> bool:
        """Say that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the factors can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works."""
        return True


def _localized(plan: Plan, model: PreTrainedModel) -> Plan:
    """Translate layer names between a base model and the same model with a head.

    Layers that the model does not have, those of a head, are left out.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = model.base_model_prefix + "."

    def translated(name: str | None) -> str | None:
        candidates = () if name is None else (name, prefix + name, name.removeprefix(prefix))
        return next((name for name in candidates if name in names), None)

    layers = []
    for layer in plan:
        name = translated(layer.name)
        if name is not None:
            owner, embedding = translated(layer.shares_down_with), translated(layer.tied_to) or layer.tied_to
            reader = translated(layer.feeds)
            layers.append(replace(layer, name=name, shares_down_with=owner, tied_to=embedding, feeds=reader))
    quantized = []
    for stored in plan.quantized:
        parent, _, part = stored.name.rpartition(".")
        factor = part in FACTORS and parent in plan
        name = translated(parent if factor else stored.name)
        if name is not None:
            quantized.append(replace(stored, name=f"{name}.{part}" if factor else name))
    if plan.factorized and not any(layer.rank for layer in layers):
        raise CheckpointError(
            f"config.json: none of the {len(plan.factorized)} factorized layers of {plan.model} "
            f"(such as {plan.factorized[0].name}) is in {type(model).__name__}."
        )
    return replace(plan, layers=tuple(layers), quantized=tuple(quantized))

"""A model card beside every compressed model that ``save_pretrained`` writes."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedModel

from lowrank.cardfile import write_card
from lowrank.cards import transformers_card
from lowrank.planning import Plan

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""``owner/model``; a path of the machine at hand has no place in a card."""


def refresh_card(model: PreTrainedModel, folder: Path, plan: Plan | None) -> None:
    """Make the card in ``folder`` that of ``model``, as ``plan`` compressed it; without one there is none."""
    text = None if plan is None else transformers_card(model, plan.budget, _base_model(model))
    write_card(folder, text)


def _base_model(model: PreTrainedModel) -> str | None:
    name = model.config.name_or_path
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else None

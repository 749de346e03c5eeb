"""The hook through which `lowrank.hf` answers questions about transformers models.

The default adapter knows plain modules only. `lowrank.hf` registers one that knows transformers, as soon as
transformers' models are imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowrank.files.state_dict import stored_tensors
from lowrank.inspection.heads import output_layer
from lowrank.inspection.inspection import Inspection
from lowrank.plans.plan import Plan


class Adapter:
    """The questions, with the answers for plain modules."""

    def heads(self, seen: Inspection) -> Mapping[str, str]:
        """Return ``{layer name: head}`` of layers that the model's structure shows to belong to a head."""
        return output_layer(seen)

    def separately_saved(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the modules within ``model`` that are saved on their own."""
        return ()

    def check_unquantized(self, model: nn.Module) -> None:
        """Refuse a model that another method has quantized; its checkpoint could not say both."""

    def check_tokenizer(self, model: nn.Module, tokenizer: Any) -> None:
        """Refuse a tokenizer that cannot be the model's."""

    def recorded(self, model: nn.Module) -> Plan | None:
        """Return the plan that the model's configuration holds."""
        return None

    def record(self, model: nn.Module, plan: Plan | None = None) -> None:
        """Write into the model's configuration what is compressed in it."""

    def saves(self, model: nn.Module) -> bool:
        """Tell whether the model has a format of its own, for `save`."""
        return False

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the model to ``folder`` in its own format."""
        raise NotImplementedError

    def saved_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint of the model, by their names there."""
        return stored_tensors(model)[0]


_current = Adapter()


def register_adapter(adapter: Adapter) -> None:
    """Let everyone ask ``adapter`` from now on."""
    global _current
    _current = adapter


def adapter() -> Adapter:
    """Return the adapter that was registered last."""
    return _current


def inspect(model: nn.Module) -> Inspection:
    """Look at a model, with what the adapter knows of it.

    Raises:
        LowRankError: If it is no module that holds layers.
    """
    seen = Inspection(model)
    seen.separately_saved = adapter().separately_saved(model)
    seen.known_heads = adapter().heads(seen)
    return seen

"""One look at a model: its layers, how they are tied, and what reading its code tells; each found once.

The verbs make one `Inspection` and hand it on, so that a call reads the code of a model and hashes its
weights once, however many stages ask. It holds until the model changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from torch import nn

from lowrank.inspection.dead_branches import names_set
from lowrank.inspection.fingerprints import fingerprint_of_layer
from lowrank.inspection.layers import check_holder, linear_layers
from lowrank.inspection.tied_weights import embedding_layers, equal_layers, place_of, tied_heads
from lowrank.inspection.weight_reads import layers_read
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedLinear,
    TiedLinear,
    find_layer_type,
    layer_type_of,
)


class Inspection:
    """What is known of a model without running it; nothing here changes it.

    Args:
        model: A module that holds layers.

    Attributes:
        separately_saved: Names of the modules within it that are saved on their own: of two equal weights
            one is kept only where both are in the same of them.
        reasons: What `lowrank.inspection.eligibility` has found, so that it looks once.
        known_heads: ``{layer name: head}`` of layers that belong to a head, beside those that names tell.

    Raises:
        LowRankError: If it is no module, or one that `torch.compile` has wrapped.
        TargetError: If it is itself a layer or an embedding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = check_holder(model)
        self.separately_saved: Sequence[str] = ()
        self.known_heads: Mapping[str, str] = {}
        self._fingerprints: dict[str, str] = {}
        self.reasons: dict[tuple[object, ...], str | None] = {}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module under each of its names."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def linear(self) -> dict[str, nn.Module]:
        """Every linear layer under each of its names; the inside of a factorized one is skipped."""
        return dict(linear_layers(self.model))

    @cached_property
    def embeddings(self) -> dict[str, nn.Embedding | LowRankEmbedding]:
        """Every embedding under each of its names; the inside of a factorized one is skipped."""
        return dict(embedding_layers(self.model))

    @cached_property
    def tied_heads(self) -> dict[str, str]:
        """``{layer name: embedding name}`` of the linear layers whose weight is that of an embedding."""
        return tied_heads(self.model)

    @cached_property
    def readers(self) -> dict[int, str]:
        """By ``id`` of a layer, the class of the nearest module whose methods read its weight by value."""
        return find_readers(self.model)

    @cached_property
    def doubts(self) -> dict[str, str]:
        """``{name: reason}`` of every linear layer and embedding of which reading the code leaves a doubt."""
        layers = (*self.linear.items(), *self.embeddings.items())
        found = {name: _doubt(module, self.readers) for name, module in layers}
        return {name: reason for name, reason in found.items() if reason is not None}

    def doubts_but(self, overruled: Collection[str]) -> dict[str, str]:
        """Return the doubts about all layers but those whose doubts a user has overruled."""
        return {name: reason for name, reason in self.doubts.items() if name not in overruled}

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """By ``id`` of a module, all of its names."""
        found: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            found.setdefault(id(module), []).append(name)
        return found

    @cached_property
    def owners(self) -> dict[int, list[str]]:
        """By place of a parameter in memory, the names of all parameters there."""
        found: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            found.setdefault(place_of(parameter), []).append(name)
        return found

    def release(self) -> None:
        """Let go of all modules but the model: it is about to change, and what it loses must be freed."""
        for name in ("modules", "linear", "embeddings"):
            self.__dict__.pop(name, None)

    def fingerprint(self, name: str) -> str:
        """Return the digest of a layer's weight, which is computed once."""
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint_of_layer(self.modules[name])
        return self._fingerprints[name]

    def equal_layers(self, names: Collection[str]) -> list[list[str]]:
        """Group the layers among ``names`` whose weights are one, or equal to the last element."""
        modules = dict(self.model.named_modules())  # each under one name
        return equal_layers(modules, names, self.fingerprint, self.separately_saved)


def find_readers(model: nn.Module) -> dict[int, str]:
    """Return by ``id`` of a layer the class of the nearest module whose methods read its weight by value."""
    classes: set[type] = {type(module) for module in model.modules()}
    changing = frozenset[str]().union(*map(names_set, classes))
    readers: dict[int, str] = {}  # of several the nearest, which comes last
    for module in model.modules():
        for layer in layers_read(module, changing):
            readers[id(layer)] = type(module).__name__
    return readers


def _doubt(layer: nn.Module, readers: Mapping[int, str]) -> str | None:
    if id(layer) in readers:
        return f"has its weight read by value in {readers[id(layer)]}"
    own = isinstance(layer, (LowRankLinear, QuantizedLinear, TiedLinear))
    layer_type = find_layer_type(layer.layer_type) if own else layer_type_of(layer)  # type: ignore[arg-type]
    if layer_type is not None and not layer_type.certain:
        return f"is a {layer_type.module.__name__}, which may compute something else than nn.Linear"
    return None

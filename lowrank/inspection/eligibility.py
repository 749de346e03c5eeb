"""Which linear layers and embeddings must stay as they are, and why: read from the model, not from a list.

Drafting a plan asks for the reasons; carrying one out checks against them. A reason reads on from "it …":
``"is used twice, also as encoder.b"``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lowrank.inspection.inspection import Inspection
from lowrank.inspection.tied_weights import place_of
from lowrank.linalg.svd import FLOATING
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedModule,
    TiedLinear,
    features_before,
    layer_type_of,
)


def ineligible_layers(
    seen: Inspection, tied_to: Mapping[str, str] | None = None, doubts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return ``{layer name: reason}`` for every linear layer that cannot be factorized.

    Args:
        seen: The model.
        tied_to: ``{layer name: name of another}`` of layers that are replaced together with another, whose
            weight they use; that they share one is then allowed.
        doubts: Those that count, of `Inspection.doubts`; by default all.
    """
    doubts = seen.doubts if doubts is None else doubts
    groups: dict[str, set[str]] = {}
    for name, owner in (tied_to or {}).items():
        groups.setdefault(owner, {f"{owner}.weight"}).add(f"{name}.weight")
    found = {}
    for name, module in seen.linear.items():
        shared = groups.get((tied_to or {}).get(name, name), ())
        found[name] = _reason(seen, doubts, name, module, frozenset(shared))
    return {name: reason for name, reason in found.items() if reason}


def ineligible_embeddings(seen: Inspection, doubts: Mapping[str, str]) -> dict[str, str]:
    """Return ``{embedding name: reason}`` for every embedding that must stay as it is.

    Heads that are tied to an embedding stand in its way only where they themselves could not be replaced.
    """
    found = {}
    for name, embedding in seen.embeddings.items():
        group = [head for head, owner in seen.tied_heads.items() if owner == name]
        shared = frozenset(f"{one}.weight" for one in (name, *group))
        reason = _reason(seen, doubts, name, embedding, shared, corrects_bias=False)
        for head in group:
            why = _reason(seen, doubts, head, seen.modules[head], shared, corrects_bias=False)
            reason = reason or (f"is tied to {head}, which {why}" if why else None)
        if reason:
            found[name] = reason
    return found


def lost_neurons(module: nn.Module) -> str | None:
    """Return why a layer that has lost neurons is not factorized; ``None`` if it has lost none."""
    before = features_before(module)
    if before is None:
        return None
    return f"has lost neurons already: its weight was (out={before[0]}, in={before[1]})"


def ineligible_modules(
    seen: Inspection, tied_to: Mapping[str, str], doubts: Mapping[str, str]
) -> dict[str, str]:
    """Return what `ineligible_layers` and `ineligible_embeddings` find."""
    return ineligible_layers(seen, tied_to, doubts) | ineligible_embeddings(seen, doubts)


def find_equals(seen: Inspection, wanted: Collection[str], doubts: Mapping[str, str]) -> dict[str, str]:
    """Return ``{layer name: name of the first}`` for linear layers whose weight is another's, or equal.

    Only layers of ``wanted`` are compared, in its order, and only those returned that can be replaced
    together; for ``doubts`` see `ineligible_layers`.
    """
    found: dict[str, str] = {}
    for group in seen.equal_layers(wanted):
        members: list[str] = []
        while members != group:  # one that must stay holds those back that are tied to it
            members, shared = group, frozenset(f"{name}.weight" for name in group)
            group = [
                n
                for n in group
                if not (_reason(seen, doubts, n, seen.modules[n], shared) or lost_neurons(seen.modules[n]))
            ]
        found |= dict.fromkeys(members[1:], members[0]) if members else {}
    return found


def _reason(
    seen: Inspection,
    doubts: Mapping[str, str],
    name: str,
    module: nn.Module,
    shared: frozenset[str],
    *,
    corrects_bias: bool = True,
) -> str | None:
    """Return what stands in a layer's way, or ``None``.

    Args:
        seen: The model.
        doubts: Those that count.
        name: The layer's name.
        module: The layer.
        shared: The weights that it may share, since their modules are replaced with it.
        corrects_bias: Whether its bias is to take up the mean of an error.
    """
    if isinstance(module, TiedLinear):
        return f"uses the weight of a {type(module.owner).__name__}, and is changed with that"
    if isinstance(module, (LowRankLinear, LowRankEmbedding)):
        return f"is factorized already, at rank {module.rank}; decompress(model) undoes that"
    if isinstance(module, QuantizedModule):
        return f"is quantized already ({module.scheme.name}); decompress(model) undoes that"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "has a max_norm, so that reading changes it"
    others = [other for other in seen.names[id(module)] if other != name]
    if others:
        return f"is used twice, also as {others[0]}"
    if name in doubts:
        return doubts[name]
    if layer_type_of(module) is None and type(module) is not nn.Embedding:
        return f"is a {type(module).__name__}, which may do something else than nn.Embedding"
    return _reason_of_layer(seen, name, module, shared, corrects_bias)


def _reason_of_layer(
    seen: Inspection, name: str, module: nn.Module, shared: frozenset[str], corrects_bias: bool
) -> str | None:
    """Return what `_reason` does, doubts aside; each layer is looked at once."""
    asked = name, shared, corrects_bias
    if asked not in seen.reasons:
        seen.reasons[asked] = _reason_of_parameters(seen, name, module, shared, corrects_bias)
    return seen.reasons[asked]


def _reason_of_parameters(
    seen: Inspection, name: str, module: nn.Module, shared: frozenset[str], corrects_bias: bool
) -> str | None:
    """Return what of a layer's weight and bias stands in its way, or ``None``."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
        return f"has a weight of type {type(weight).__name__}, not a plain parameter"
    others = [n for n in seen.owners[place_of(weight)] if n != f"{name}.weight" and n not in shared]
    if others:
        return f"shares its weight with {others[0]} (tied)"
    if isinstance(bias, nn.Parameter) and corrects_bias:  # it could be corrected for one only
        others = [n for n in seen.owners[place_of(bias)] if n != f"{name}.bias"]
        if others:
            return f"shares its bias with {others[0]} (tied)"
    if weight.dtype not in FLOATING:
        return f"has a weight of {weight.dtype}, not floating point; it may be quantized already"
    if weight.numel() == 0:
        return "has a weight without elements"
    if "forward" in vars(module):
        return "has a forward replaced on the instance, as offloading does"
    return None

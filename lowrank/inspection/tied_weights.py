"""Which modules of a model use one weight: embeddings and tied heads, linear layers with equal ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedModule, TiedLinear, layer_type_of


def embedding_layers(model: nn.Module) -> Iterator[tuple[str, nn.Embedding | LowRankEmbedding]]:
    """Yield every embedding under each of its names; the inside of a factorized one is skipped."""
    inside = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, LowRankEmbedding):
            inside = name + "."
            yield name, module
        elif isinstance(module, nn.Embedding):
            yield name, module


def tied_heads(model: nn.Module) -> dict[str, str]:
    """Return ``{layer name: embedding name}`` for the linear layers whose weight is that of one embedding.

    Where several embeddings have that weight, none of them has a say over the others.
    """
    embeddings: dict[int, list[str]] = {}
    for name, embedding in embedding_layers(model):
        if isinstance(embedding, nn.Embedding):
            embeddings.setdefault(place_of(embedding.weight), []).append(name)
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            owners = embeddings.get(place_of(module.weight), [])
            if len(owners) == 1:
                found[name] = owners[0]
    return found


def followers(model: nn.Module) -> dict[str, str]:
    """Return ``{layer name: name of the owner}`` for the layers that use another module's factors or codes.

    An owner outside of ``model`` has the name ``""``.
    """
    owners = LowRankEmbedding, LowRankLinear, QuantizedModule
    names = {id(m): n for n, m in model.named_modules() if isinstance(m, owners)}
    return {n: names.get(id(m.owner), "") for n, m in model.named_modules() if isinstance(m, TiedLinear)}


def equal_layers(
    modules: Mapping[str, nn.Module],
    names: Iterable[str],
    fingerprint: Callable[[str], str],
    separately_saved: Iterable[str] = (),
) -> list[list[str]]:
    """Group the linear layers among ``names`` whose weights are one parameter, or equal to the last element.

    Of each weight a sample is looked at, and all of it only where another has the same. A constant weight is
    equal to others by itself, and not as their copy.

    Args:
        modules: What has them, by name; on the meta device nothing is equal.
        names: The layers to compare; groups have their order.
        fingerprint: Returns the digest of a layer's weight by name (`Inspection.fingerprint`).
        separately_saved: Names of modules that are saved on their own: nothing inside of one
            is compared with what is outside.
    """
    groups: dict[tuple[object, ...], list[list[str]]] = {}
    for name in names:
        layer_type = layer_type_of(modules[name]) if name in modules else None
        weight = modules[name].weight if layer_type is not None else None
        if layer_type is None or not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
            continue
        if is_lazy(weight) or weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        home = max((part for part in separately_saved if name.startswith(f"{part}.")), key=len, default="")
        key = home, layer_type.name, weight.dtype, weight.device, fingerprint(name)
        alike = groups.setdefault(key, [])
        group = next((one for one in alike if _are_equal(modules[one[0]].weight, weight)), None)  # type: ignore[arg-type]
        if group is None:
            alike.append([name])
        else:
            group.append(name)
    return [group for alike in groups.values() for group in alike if len(group) > 1]


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if place_of(one) == place_of(other) and one.stride() == other.stride():
        return True
    return torch.equal(one, other) and not bool((one == one.flatten()[0]).all())


def is_copy(modules: Mapping[str, nn.Module], name: str, owner: str) -> bool:
    """Tell whether a layer has a weight of its own, and not the parameter of ``owner``."""
    one, other = (modules[layer].weight for layer in (name, owner))
    return place_of(one) != place_of(other)  # type: ignore[arg-type]


def pads_with_zeros(embedding: nn.Embedding) -> bool:
    """Tell whether the padding row of ``embedding`` is zero, and must stay so."""
    row = (
        None
        if embedding.padding_idx is None or embedding.weight.is_meta
        else embedding.weight[embedding.padding_idx]
    )
    return row is not None and not bool(row.any())


def place_of(parameter: Tensor) -> int:
    """Tell parameters apart by where their data lies; on the meta device, by identity."""
    without_data = parameter.is_meta or is_lazy(parameter)
    return id(parameter) if without_data else parameter.data_ptr() or id(parameter)

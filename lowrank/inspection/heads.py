"""Which layers belong to an output head, as names, containers and the layers before them tell.

A layer with a head's name in its own belongs to one, unless an `nn.Sequential` of that name goes on to
another linear layer: of VGG's ``classifier`` the last of three is the head. Where the weights of a model are
mostly no linear layers, but convolutions or recurrent layers, the last layer is a head whatever its name.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lowrank.inspection.inspection import Inspection
from lowrank.inspection.layers import dense_elements, other_parameters

HEADS = frozenset(
    {
        *("classifier", "pre_classifier", "score", "qa_outputs", "pooler", "sequence_summary"),
        *("lm_head", "lm_loss", "embed_out", "cls", "predictions", "seq_relationship", "head", "heads"),
        *("generator_lm_head", "generator_predictions", "discriminator_predictions"),
        *("classification_head", "mlm_head", "decode_head"),
        *("vocab_projector", "vocab_transform", "logits_proj"),
    }
)
"""Name components of output heads: small, close to the loss, and often tied to an embedding."""


def heads_of(seen: Inspection) -> dict[str, tuple[str, ...]]:
    """Return ``{layer name: heads}`` for the linear layers and embeddings that belong to heads.

    Args:
        seen: The model.
    """
    names = list(seen.linear)
    found = {}
    for name in [*names, *seen.embeddings]:
        parts = name.split(".")
        heads = [
            part
            for depth, part in enumerate(parts)
            if part in HEADS and not _goes_on(seen.model, parts, depth, names)
        ]
        heads += [seen.known_heads[name]] if name in seen.known_heads else []
        if heads:
            found[name] = tuple(heads)
    return found


def _goes_on(model: nn.Module, parts: list[str], depth: int, names: Collection[str]) -> bool:
    """Tell whether an `nn.Sequential` inside of the head at ``depth`` has a linear layer after this one."""
    for end in range(depth + 1, len(parts)):
        path = ".".join(parts[:end])
        container = model.get_submodule(path)
        if isinstance(container, nn.Sequential):
            children = list(container._modules)
            later = {f"{path}.{child}" for child in children[children.index(parts[end]) + 1 :]}
            if any(name in later or name.startswith(tuple(f"{one}." for one in later)) for name in names):
                return True
    return False


def output_layer(seen: Inspection) -> dict[str, str]:
    """Return ``{layer name: its last part}`` for the last layer, where what precedes it is of other kinds.

    That is a linear layer after all other matrices of the model, of which those in no linear layer, or in one
    whose module multiplies by the weight itself, have more elements than the other linear layers. A stack of
    linear layers has none: its last layer is like the others.
    """
    places = {name: place for place, (name, _) in enumerate(seen.model.named_modules())}
    layers = {name: layer for name, layer in seen.linear.items() if name in places}
    matrices = [(name, p.numel()) for name, _, _, p in other_parameters(seen.model) if p.ndim > 1]
    readers, last = seen.readers, next(reversed(layers), None)
    read = {name for name, layer in layers.items() if id(layer) in readers}
    if last is None or last in read or any(places[name] > places[last] for name, _ in matrices):
        return {}
    sizes = {name: dense_elements(layer) for name, layer in layers.items()}
    trunk = sum(size for _, size in matrices) + sum(sizes[name] for name in read)
    others = sum(size for name, size in sizes.items() if name not in read and name != last)
    return {last: last.rpartition(".")[2]} if trunk > others else {}

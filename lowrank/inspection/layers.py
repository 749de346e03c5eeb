"""Walk a model: its linear layers, its other parameters, and what is no model at all."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank.errors import LowRankError, TargetError
from lowrank.inspection.tied_weights import embedding_layers, place_of
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedLinear,
    QuantizedModule,
    TiedLinear,
    features_before,
    layer_type_of,
)


def check_model(model: object) -> nn.Module:
    """Return ``model`` if it is a module.

    Raises:
        LowRankError: If it is something else, such as a path, if it only wraps a transformers model, or
            if it has parameters without a shape.
    """
    if not isinstance(model, nn.Module):
        raise LowRankError(
            f"A model is a torch.nn.Module, not {type(model).__name__}. Load it first, for example "
            "with AutoModel.from_pretrained(...)."
        )
    _check_not_wrapped(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise LowRankError(
                f"{name}: has no shape yet, which a layer such as LazyLinear gets when it is first called. "
                "Call the model on a batch first."
            )
    return model


def _check_not_wrapped(model: nn.Module) -> None:
    """Refuse a module of sentence-transformers: it takes a dict of features, not a model's inputs."""
    if not _is_of(model, "sentence_transformers"):
        return
    parts = (name for name, part in model.named_modules() if name and _is_of(part, "transformers"))
    inner, wrapper, way = next(parts, None), type(model).__name__, "Pass the transformers model inside of it"
    if inner is not None:
        path = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in inner.split("."))
        way += f", model{path}, which is changed in place: the {wrapper} then computes with it"
    raise LowRankError(f"The model is a {wrapper}, which wraps one and takes other inputs. {way}.")


def _is_of(module: nn.Module, package: str) -> bool:
    """Tell whether the module's class, or one that it extends, is defined in ``package``."""
    return any(cls.__module__.partition(".")[0] == package for cls in type(module).__mro__)


def check_not_compiled(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is not what `torch.compile` has made: names of layers would begin with its own.

    Raises:
        LowRankError: If it is.
    """
    if "_orig_mod" in model._modules:
        raise LowRankError(
            "The model is wrapped by torch.compile. Pass the module that was compiled (compiled._orig_mod), "
            "and compile what comes back."
        )
    return model


def check_holder(model: object) -> nn.Module:
    """Return ``model`` if it is a module that holds layers, and not itself one that would be replaced.

    Raises:
        LowRankError: If it is no module, or one that `torch.compile` has wrapped.
        TargetError: If it is a layer or an embedding.
    """
    module = check_not_compiled(check_model(model))
    own = (nn.Linear, nn.Embedding, LowRankLinear, LowRankEmbedding, TiedLinear, QuantizedModule)
    if isinstance(module, own) or layer_type_of(module) is not None:
        made = isinstance(module, (LowRankLinear, LowRankEmbedding, TiedLinear, QuantizedModule))
        way = (
            "its weight is model.dense_weight()"
            if made
            else "LowRankLinear.from_linear(layer, rank) is for one"
        )
        raise TargetError(
            f"The model is itself a {type(module).__name__}, and no module can replace itself. Pass the "
            f"module that holds it; {way}."
        )
    return module


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every linear layer under each of its names; the inside of a factorized one is skipped."""
    inside = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, (LowRankLinear, LowRankEmbedding)):
            inside = name + "."
            if isinstance(module, LowRankLinear):
                yield name, module
        elif (
            isinstance(module, (nn.Linear, QuantizedLinear, TiedLinear)) or layer_type_of(module) is not None
        ):
            yield name, module


def dense_elements(layer: nn.Module) -> int:
    """Count the elements that the weight of a linear layer or embedding has, or had when it was dense."""
    if isinstance(layer, LowRankEmbedding):
        return layer.num_embeddings * layer.embedding_dim
    if isinstance(layer, (LowRankLinear, TiedLinear)):
        return layer.in_features * layer.out_features
    weight: Tensor = layer.weight  # type: ignore[assignment]
    now = layer.shape if isinstance(layer, QuantizedModule) else weight.shape
    return math.prod(features_before(layer) or now)


def other_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield the parameters that are no weight or factor of a linear layer or embedding, in the model's order.

    With each its module's name, the module, and its own name there; a tied one comes once.
    """
    known = [*linear_layers(model), *embedding_layers(model)]
    within = {id(part) for _, layer in known for part in layer.modules()} - {id(layer) for _, layer in known}
    seen = {place_of(x.weight) for _, x in known if isinstance(x.weight, nn.Parameter)}  # type: ignore[arg-type]
    for holder, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            factor = id(module) in within and parameter.ndim > 1
            if not factor and place_of(parameter) not in seen:
                seen.add(place_of(parameter))
                yield holder, module, name, parameter

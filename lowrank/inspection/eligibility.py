"""Which linear layers must stay as they are, and why: found in the model, not in a list of models.

Drafting a plan asks for the reasons; applying one checks against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank.errors import LowRankError, TargetError
from lowrank.inspection.dead_branches import names_set
from lowrank.inspection.tied_weights import embedding_layers, equal_layers, place_of, tied_heads
from lowrank.inspection.weight_reads import layers_read
from lowrank.linalg.svd import FLOATING
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedLinear,
    QuantizedModule,
    TiedLinear,
    find_layer_type,
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
        TargetError: If it is a layer or a table.
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
    """Count the elements that the weight of a linear layer or table has, or had when it was dense."""
    if isinstance(layer, LowRankEmbedding):
        return layer.num_embeddings * layer.embedding_dim
    if isinstance(layer, (LowRankLinear, TiedLinear)):
        return layer.in_features * layer.out_features
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return math.prod(layer.shape) if isinstance(layer, QuantizedModule) else weight.numel()


def other_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield the parameters that are no weight or factor of a linear layer or table, in the model's order.

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


def find_obstacles(
    model: nn.Module, tied_to: Mapping[str, str] | None = None, doubts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return ``{layer name: reason}`` for every linear layer that cannot be factorized.

    A reason reads on from "it …": ``"is used twice, also as encoder.b"``.

    Args:
        model: What has the layers.
        tied_to: ``{layer name: name of another}`` of layers that are replaced together with another, whose
            weight they use; that they share one is then no obstacle.
        doubts: Those that count, from `find_doubts`; by default all.
    """
    obstacle = _finder(model, doubts)
    groups: dict[str, set[str]] = {}
    for name, owner in (tied_to or {}).items():
        groups.setdefault(owner, {f"{owner}.weight"}).add(f"{name}.weight")
    found = {}
    for name, module in linear_layers(model):
        shared = groups.get((tied_to or {}).get(name, name), ())
        found[name] = obstacle(name, module, frozenset(shared))
    return {name: reason for name, reason in found.items() if reason}


def find_equals(
    model: nn.Module, wanted: Collection[str], separately_saved: Sequence[str], doubts: Mapping[str, str]
) -> dict[str, str]:
    """Return ``{layer name: name of the first}`` for linear layers whose weight is another's, or equal.

    Only layers of ``wanted`` are compared, in its order, and only those returned that can be replaced
    together; for ``separately_saved`` see `lowrank.inspection.tied_weights.equal_layers`, for
    ``doubts`` `find_obstacles`.
    """
    groups = equal_layers(model, wanted, separately_saved)
    obstacle = _finder(model, doubts) if groups else None
    found: dict[str, str] = {}
    for group in groups:
        assert obstacle is not None
        members: list[str] = []
        while members != group:  # one that must stay holds those back that are tied to it
            members, shared = group, frozenset(f"{name}.weight" for name in group)
            group = [name for name in group if not obstacle(name, model.get_submodule(name), shared)]
        found |= dict.fromkeys(members[1:], members[0]) if members else {}
    return found


def find_all_obstacles(
    model: nn.Module, tied_to: Mapping[str, str], doubts: Mapping[str, str]
) -> dict[str, str]:
    """Return what `find_obstacles` and `find_embedding_obstacles` find."""
    return find_obstacles(model, tied_to, doubts) | find_embedding_obstacles(model, doubts)


def find_embedding_obstacles(model: nn.Module, doubts: Mapping[str, str]) -> dict[str, str]:
    """Return ``{table name: reason}`` for every table that must stay as it is, as `find_obstacles`.

    Heads that are tied to a table stand in its way only where they themselves could not be replaced.
    """
    obstacle = _finder(model, doubts)
    heads = tied_heads(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, table in embedding_layers(model):
        group = [head for head, owner in heads.items() if owner == name]
        shared = frozenset(f"{one}.weight" for one in (name, *group))
        reason = obstacle(name, table, shared, False)
        for head in group:
            why = obstacle(head, modules[head], shared, False)
            reason = reason or (f"is tied to {head}, which {why}" if why else None)
        if reason:
            found[name] = reason
    return found


def find_doubts(model: nn.Module, overruled: Collection[str] = ()) -> dict[str, str]:
    """Return ``{name: reason}`` for every linear layer and table of which reading the code leaves a doubt.

    All code of the model is read for that, once: hand the result on. The reasons are among those of
    `find_obstacles`. Layers that are factorized or coded are there, too. Those ``overruled`` are left out.
    """
    readers = find_readers(model)
    layers = (*linear_layers(model), *embedding_layers(model))
    found = {name: _doubt(module, readers) for name, module in layers if name not in overruled}
    return {name: reason for name, reason in found.items() if reason is not None}


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


def _finder(model: nn.Module, doubts: Mapping[str, str] | None) -> Callable[..., str | None]:
    """Look the model over once, and return the function that tells what stands in a layer's way.

    Its third argument names the weights that a layer may share, since their modules are replaced with it.
    With ``False`` as its last, the layer's bias stays as it is.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(place_of(parameter), []).append(name)
    doubts = find_doubts(model) if doubts is None else doubts

    def obstacle(
        name: str, module: nn.Module, shared: frozenset[str], corrects_bias: bool = True
    ) -> str | None:
        if isinstance(module, TiedLinear):
            return f"uses the weight of a {type(module.owner).__name__}, and is changed with that"
        if isinstance(module, (LowRankLinear, LowRankEmbedding)):
            return f"is factorized already, at rank {module.rank}; decompress(model) undoes that"
        if isinstance(module, QuantizedModule):
            return f"is quantized already ({module.scheme.name}); decompress(model) undoes that"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "has a max_norm, so that reading changes it"
        if len(names[id(module)]) > 1:
            other = next(n for n in names[id(module)] if n != name)
            return f"is used twice, also as {other}"
        if name in doubts:
            return doubts[name]
        if layer_type_of(module) is None and type(module) is not nn.Embedding:
            return f"is a {type(module).__name__}, which may do something else than nn.Embedding"
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
            return f"has a weight of type {type(weight).__name__}, not a plain parameter"
        others = [n for n in owners[place_of(weight)] if n != f"{name}.weight" and n not in shared]
        if others:
            return f"shares its weight with {others[0]} (tied)"
        bias = getattr(module, "bias", None)
        if (
            isinstance(bias, nn.Parameter) and len(owners[place_of(bias)]) > 1 and corrects_bias
        ):  # it could be corrected for one only
            other = next(n for n in owners[place_of(bias)] if n != f"{name}.bias")
            return f"shares its bias with {other} (tied)"
        if weight.dtype not in FLOATING:
            return f"has a weight of {weight.dtype}, not floating point; it may be quantized already"
        if weight.numel() == 0:
            return "has a weight without elements"
        if "forward" in vars(module):
            return "has a forward replaced on the instance, as offloading does"
        return None

    return obstacle

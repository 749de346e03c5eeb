"""Which linear layers must stay as they are, and why: found in the model, not in a list of models.

Drafting a plan asks for the reasons; applying one checks against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank.errors import LowRankError
from lowrank.linalg.svd import FLOATING
from lowrank.nn import Coded, LowRankLinear, QuantizedLinear, kind_of
from lowrank.reads import layers_read


def check_model(model: object) -> nn.Module:
    """Return ``model`` if it is a module.

    Raises:
        LowRankError: If it is something else, such as a path.
    """
    if not isinstance(model, nn.Module):
        raise LowRankError(
            f"A model is a torch.nn.Module, not {type(model).__name__}. Load it first, for example "
            "with AutoModel.from_pretrained(...)."
        )
    return model


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every linear layer under each of its names; the inside of a factorized one is skipped."""
    inside = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, LowRankLinear):
            inside = name + "."
            yield name, module
        elif isinstance(module, (nn.Linear, QuantizedLinear)) or kind_of(module) is not None:
            yield name, module


def find_obstacles(model: nn.Module) -> dict[str, str]:
    """Return ``{layer name: reason}`` for every linear layer that cannot be factorized.

    A reason reads on from "it …": ``"is used twice, also as encoder.b"``.
    """
    return _found(model, linear_layers(model))


def embeddings(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """Yield every embedding table under each of its names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding):
            yield name, module


def find_embedding_obstacles(model: nn.Module) -> dict[str, str]:
    """Return ``{table name: reason}`` for every embedding that cannot be coded, as `find_obstacles`."""
    return _found(model, embeddings(model))


def _found(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    obstacle = _finder(model)
    found = {name: obstacle(name, module) for name, module in modules}
    return {name: reason for name, reason in found.items() if reason}


def _finder(model: nn.Module) -> Callable[[str, nn.Module], str | None]:
    """Look the model over once, and return the function that tells what stands in a layer's way."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_place(parameter), []).append(name)
    readers: dict[int, str] = {}  # of several the nearest, which comes last
    for module in model.modules():
        for layer in layers_read(module):
            readers[id(layer)] = type(module).__name__

    def obstacle(name: str, module: nn.Module) -> str | None:
        if isinstance(module, LowRankLinear):
            return f"is factorized already, at rank {module.rank}; decompress(model) undoes that"
        if isinstance(module, Coded):
            return f"is quantized already ({module.scheme.name}); decompress(model) undoes that"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "has a max_norm, so that reading changes it"
        if len(names[id(module)]) > 1:
            other = next(n for n in names[id(module)] if n != name)
            return f"is used twice, also as {other}"
        if id(module) in readers:
            return f"has its weight read by value in {readers[id(module)]}"
        if kind_of(module) is None and type(module) is not nn.Embedding:
            return f"is a {type(module).__name__}, which may compute something else than nn.Linear"
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
            return f"has a weight of type {type(weight).__name__}, not a plain parameter"
        if len(owners[_place(weight)]) > 1:
            other = next(n for n in owners[_place(weight)] if n != f"{name}.weight")
            return f"shares its weight with {other} (tied)"
        bias = getattr(module, "bias", None)
        if (
            isinstance(bias, nn.Parameter) and len(owners[_place(bias)]) > 1
        ):  # it could be corrected for one only
            other = next(n for n in owners[_place(bias)] if n != f"{name}.bias")
            return f"shares its bias with {other} (tied)"
        if weight.dtype not in FLOATING:
            return f"has a weight of {weight.dtype}, not floating point; it may be quantized already"
        if weight.numel() == 0:
            return "has a weight without elements"
        if "forward" in vars(module):
            return "has a forward replaced on the instance, as offloading does"
        return None

    return obstacle


def _place(parameter: Tensor) -> int:
    """Tell parameters apart by where their data lies; on the meta device, by identity."""
    without_data = parameter.is_meta or is_lazy(parameter)
    return id(parameter) if without_data else parameter.data_ptr() or id(parameter)

"""Which modules of a model use one weight, found in the model: a table and the heads tied to it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank.nn import Coded, LowRankEmbedding, TiedLinear


def embeddings(model: nn.Module) -> Iterator[tuple[str, nn.Embedding | LowRankEmbedding]]:
    """Yield every table under each of its names; the inside of a factorized one is skipped."""
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
    """Return ``{layer name: table name}`` for the linear layers whose weight is that of one embedding table.

    Where several tables have that weight, none of them has a say over the others.
    """
    tables: dict[int, list[str]] = {}
    for name, table in embeddings(model):
        if isinstance(table, nn.Embedding):
            tables.setdefault(place_of(table.weight), []).append(name)
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            owners = tables.get(place_of(module.weight), [])
            if len(owners) == 1:
                found[name] = owners[0]
    return found


def followers(model: nn.Module) -> dict[str, str]:
    """Return ``{layer name: name of the owner}`` for the layers that use another module's factors or codes.

    An owner outside of ``model`` has the name ``""``.
    """
    names = {id(m): n for n, m in model.named_modules() if isinstance(m, (LowRankEmbedding, Coded))}
    return {n: names.get(id(m.owner), "") for n, m in model.named_modules() if isinstance(m, TiedLinear)}


def pads_with_zeros(table: nn.Embedding) -> bool:
    """Tell whether the padding row of ``table`` is zero, and must stay so."""
    row = None if table.padding_idx is None or table.weight.is_meta else table.weight[table.padding_idx]
    return row is not None and not bool(row.any())


def place_of(parameter: Tensor) -> int:
    """Tell parameters apart by where their data lies; on the meta device, by identity."""
    without_data = parameter.is_meta or is_lazy(parameter)
    return id(parameter) if without_data else parameter.data_ptr() or id(parameter)

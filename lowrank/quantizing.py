"""Choose which weights become integers: those of dense layers, of factors and of embeddings alike.

Codes come after factorizing, never before: factors of a coded weight would carry its rounding along. So the
choice is made on a plan, for what the model will be once its layers are factorized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lowrank.errors import LowRankError, SchemeError, TargetError
from lowrank.linalg import Scheme
from lowrank.nn import Coded, LowRankLinear, kind_of
from lowrank.obstacles import (
    check_model,
    embeddings,
    find_embedding_obstacles,
    find_obstacles,
    linear_layers,
)
from lowrank.patterns import matches, no_match
from lowrank.planning import CodedWeight, LayerPlan, Plan
from lowrank.statistics import Stats
from lowrank.targets import check_patterns, not_wanted


def with_codes(
    model: nn.Module,
    plan: Plan,
    scheme: Scheme,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    stats: Stats | None = None,
    heads: Mapping[str, str] | None = None,
) -> Plan:
    """Return ``plan`` with what `lowrank.quantize` codes in ``model`` when the plan has been carried out.

    Raises:
        TargetError: If a pattern matches nothing, or names what cannot be coded.
        SchemeError: If a weight does not divide into groups.
        LowRankError: If nothing is left to code.
    """
    chosen = list(_chosen(check_model(model), plan, scheme, targets, ignore, stats, heads or {}))
    if not chosen:
        raise LowRankError(
            f"No weight of {type(model).__name__} is left to be coded as {scheme.name}: those that could be "
            "are coded already, ignored, or part of a head (name it in targets)."
        )
    for code in chosen:
        try:
            scheme.check(code.rows, code.columns)
        except SchemeError as error:
            raise SchemeError(f"{code.name}: {error}") from error
    return replace(plan, codes=(*plan.codes, *chosen))


def _chosen(
    model: nn.Module,
    plan: Plan,
    scheme: Scheme,
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
    stats: Stats | None,
    heads: Mapping[str, str],
) -> Iterator[CodedWeight]:
    if isinstance(model, (nn.Linear, nn.Embedding, LowRankLinear, Coded)) or kind_of(model) is not None:
        raise TargetError(
            f"The model is itself a {type(model).__name__}, and no module can replace itself. "
            "Pass the module that holds the layer."
        )
    modules = dict([*linear_layers(model), *embeddings(model)])
    for pattern in [*check_patterns("targets", targets), *check_patterns("ignore", ignore)]:
        if not any(matches(name, pattern) for name in modules):
            raise no_match(pattern, list(modules), f"linear layers and embeddings of {type(model).__name__}")
    layers = {layer.name: layer for layer in plan}
    uses = Counter(id(module) for module in modules.values())
    blocked = find_obstacles(model) | find_embedding_obstacles(model)
    for name, module in modules.items():
        if not_wanted(name, targets, ignore or (), heads.get(name)):
            continue
        layer = layers.get(name)
        known = stats if stats is not None and name in stats else None
        if isinstance(module, LowRankLinear):
            plain = all(
                type(part) is nn.Linear and not part.weight.is_meta for part in (module.down, module.up)
            )
            if layer is not None and plain and uses[id(module)] == 1:
                yield from _factors(layer, plan, scheme, known)
        elif name not in blocked and layer is not None and layer.rank is not None:
            yield from _factors(layer, plan, scheme, known)
        elif name not in blocked:
            yield _whole(name, module, scheme, known)
        elif name in (targets or ()):
            raise TargetError(
                f"{name}: this weight cannot be coded: it {blocked[name]}. Take it out of targets."
            )


def _factors(layer: LayerPlan, plan: Plan, scheme: Scheme, stats: Stats | None) -> Iterator[CodedWeight]:
    """Yield both factors; a ``down`` that serves several layers stays as it is."""
    rank = layer.rank or 0
    if layer.down_of is None and layer.name not in plan.shared:
        sizes = rank, layer.in_features
        yield CodedWeight(
            *(f"{layer.name}.down", "linear", *sizes, False, scheme.name, scheme.group_size),
            *_flags(scheme, layer.has_bias, stats),
        )
    sizes = layer.out_features, rank
    yield CodedWeight(f"{layer.name}.up", "linear", *sizes, layer.has_bias, scheme.name, scheme.group_size)


def _whole(name: str, module: nn.Module, scheme: Scheme, stats: Stats | None) -> CodedWeight:
    how = scheme.name, scheme.group_size
    if isinstance(module, nn.Embedding):
        return CodedWeight(name, "embedding", module.num_embeddings, module.embedding_dim, False, *how)
    kind = kind_of(module)
    assert kind is not None  # else it would be blocked
    rows, columns = kind.weight(module).shape
    bias = module.bias is not None
    return CodedWeight(name, kind.name, rows, columns, bias, *how, *_flags(scheme, bias, stats))


def _flags(scheme: Scheme, bias: bool, stats: Stats | None) -> tuple[bool, bool]:
    """Tell whether inputs are scaled, which needs statistics, and centred, which needs a bias."""
    return stats is not None, stats is not None and bias and scheme.name == "int8"

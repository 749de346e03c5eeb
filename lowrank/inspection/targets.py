"""Draft a plan: list every linear layer of a model, and say which may change and why others may not.

Embeddings are listed where a target spells them, and with each the heads that are tied to it. Of
linear layers with one weight, or with equal ones, the first is the owner, and the others are the same as
that.

A layer is left alone, with the reason in the plan, if it is a head, if its weight is tied or read
by value elsewhere, or if it is no plain floating-point linear layer. Naming such a layer is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lowrank.arguments import patterns
from lowrank.errors import TargetError
from lowrank.inspection.eligibility import find_equals, ineligible_embeddings, ineligible_layers, lost_neurons
from lowrank.inspection.heads import heads_of
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.layers import linear_layers
from lowrank.inspection.tied_weights import embedding_layers, followers, is_copy, pads_with_zeros
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    PivotedUp,
    QuantizedLinear,
    QuantizedModule,
    TiedLinear,
    features_before,
    layer_type_of,
)
from lowrank.plans.layer_plan import EMBEDDING, LayerPlan, QuantizedWeight
from lowrank.plans.patterns import matches, no_match
from lowrank.plans.plan import Plan


def draft(
    seen: Inspection,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    embeddings: bool = False,
    equal: bool = False,
    overrule: Sequence[str] | None = None,
) -> Plan:
    """List every linear layer of a model as a plan without ranks.

    Args:
        seen: Any module, on any device; only names, shapes and dtypes are read, and weights with ``equal``.
        targets: Unix-style patterns on module names; ``None`` means every layer but the heads. A head
            is a target only if a pattern spells its name (``"classifier"``, ``"lm_head*"``), and so is an
            embedding (``"*.word_embeddings"``, ``"*embed*"``). An embedding and its tied heads are one.
        ignore: Patterns of layers to leave alone; they win over ``targets``.
        embeddings: Whether all embeddings are targets, too, unless ``targets`` are given.
        equal: Whether to look for layers with equal weights, of which one is kept.
        overrule: Patterns of layers that may change although reading the model's code leaves a doubt.

    Returns:
        A `Plan` with a `LayerPlan` for each linear layer, in the model's order.

    Raises:
        TargetError: If a pattern matches no linear layer, if one without wildcards names a layer
            that cannot be factorized, or if the model is itself a linear layer.
    """
    model, layers = seen.model, seen.linear
    known = [*layers, *seen.embeddings]
    given = {"targets": targets, "ignore": ignore, "overrule": overrule}
    for pattern in [pattern for name, value in given.items() for pattern in check_patterns(name, value)]:
        if not any(matches(name, pattern) for name in known):
            where = "linear layers and embeddings" if seen.embeddings else "linear layers"
            raise no_match(pattern, known, f"{where} of {type(model).__name__}")
    overruled = {
        name
        for name in seen.doubts.keys() & layers.keys()
        if not _is_dense(layers[name]) or any(matches(name, pattern) for pattern in overrule or ())
    }
    counting = seen.doubts_but(overruled)
    every = embeddings and targets is None
    embeddings_found = _embeddings(seen, counting, targets or (), ignore or (), every)
    plans = {plan.name: plan for plan in embeddings_found}
    targeted = {plan.name for plan in plans.values() if plan.targeted}
    users = followers(model) | {head: x for head, x in seen.tied_heads.items() if x in targeted}
    owners_of_equal: dict[str, str] = {}
    in_heads = heads_of(seen)
    if equal:
        wanted = [name for name in layers if not_wanted(name, targets, ignore or (), in_heads) is None]
        owners_of_equal = find_equals(seen, [name for name in wanted if name not in users], counting)
    users |= owners_of_equal
    blocked = ineligible_layers(seen, owners_of_equal, counting)
    owners = _owners_of_down(layers)
    for name, module in layers.items():
        plan = _describe(name, module, owners)
        plan = replace(plan, overruled=True) if name in overruled else plan
        if name in users:
            was_copy = is_copy(seen.modules, name, users[name]) if name in owners_of_equal else plan.was_copy
            plans[name] = replace(_following(plan, users[name]), was_copy=was_copy)
            continue
        reason = blocked.get(name) or lost_neurons(module)
        if reason and name in (targets or ()):
            tried = (
                " If reading the code is mistaken there, overrule= tries it." if name in seen.doubts else ""
            )
            raise TargetError(
                f"{name}: this layer cannot be factorized: it {reason}. "
                f"Take it out of targets; it stays as it is.{tried}"
            )
        reason = blocked.get(name) or not_wanted(name, targets, ignore or (), in_heads) or reason
        plans[name] = replace(plan, reason=reason or "", targeted=reason is None)
    return _in_order(model, plans)


def structure(model: nn.Module) -> Plan:
    """Return what the layers of a model are now, factorized, quantized or dense, without reasons."""
    layers = dict(linear_layers(model))
    owners = _owners_of_down(layers)
    users = followers(model)
    plans = {name: _describe(name, module, owners) for name, module in layers.items()}
    plans |= {name: _following(plans[name], owner) for name, owner in users.items() if name in plans}
    found = (_describe_embedding(name, module) for name, module in embedding_layers(model))
    plans |= {plan.name: plan for plan in found if plan.rank is not None}
    return _in_order(model, plans)


def _owners_of_down(layers: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return by ``id`` of a ``down`` the name of the layer that owns it."""
    return {id(x.down): n for n, x in layers.items() if isinstance(x, LowRankLinear) and x.owns_down}


def _in_order(model: nn.Module, plans: Mapping[str, LayerPlan]) -> Plan:
    """Return the plan of ``plans`` in the model's order, with what is quantized already."""
    ordered = tuple(plans[n] for n, _ in model.named_modules(remove_duplicate=False) if n in plans)
    quantized = tuple(described(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedModule))
    return Plan(model=type(model).__name__, layers=ordered, quantized=quantized)


def _embeddings(
    seen: Inspection,
    doubts: Mapping[str, str],
    targets: Sequence[str],
    ignore: Sequence[str],
    every: bool,
) -> Iterator[LayerPlan]:
    """Yield the embeddings that are factorized, or that a target spells, by their own name or that of a head.

    With ``every`` all embeddings are as if spelled.
    """
    blocked = ineligible_embeddings(seen, doubts)
    heads = seen.tied_heads
    for name, embedding in seen.embeddings.items():
        plan = _describe_embedding(name, embedding)
        group = [head for head, owner in heads.items() if owner == name]
        spelled = every or any(spells(pattern, one) for pattern in targets for one in (name, *group))
        if not spelled and plan.rank is None:
            continue
        reason = blocked.get(name) or left_alone(name, group, ignore)
        named = next((one for one in (name, *group) if one in targets), None)
        if reason and named is not None:
            raise TargetError(
                f"{named}: the embedding {name} cannot be factorized: it {reason}. Take it out of targets."
            )
        yield replace(plan, reason=reason or "", targeted=reason is None)


def spells(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` names an embedding or its head, as a target must: ``"*"`` alone does not."""
    return matches(name, pattern) and (name.rpartition(".")[2] in pattern or "embed" in pattern)


def left_alone(name: str, heads: Sequence[str], ignore: Sequence[str]) -> str | None:
    """Return why ``ignore`` leaves an embedding with its heads alone; reads on from "it …"."""
    for one in (name, *heads):
        if any(matches(one, pattern) for pattern in ignore):
            return "is ignored" if one == name else f"is tied to {one}, which is ignored"
    return None


def _describe_embedding(name: str, embedding: nn.Embedding | LowRankEmbedding) -> LayerPlan:
    rows, columns = embedding.num_embeddings, embedding.embedding_dim
    if isinstance(embedding, LowRankEmbedding):
        centred = embedding.bias is not None
        return LayerPlan(
            *(name, embedding.layer_type, columns, rows, False, embedding.rank, embedding.relative_error),
            added_bias=centred,
        )
    return LayerPlan(
        name, LowRankEmbedding.layer_type, columns, rows, False, added_bias=not pads_with_zeros(embedding)
    )


def _is_dense(layer: nn.Module) -> bool:
    return not isinstance(layer, (LowRankLinear, QuantizedLinear, TiedLinear))


def _following(plan: LayerPlan, owner: str) -> LayerPlan:
    if not owner:
        raise TargetError(
            f"{plan.name}: uses the weight of a module outside of this one. Pass the model that has both."
        )
    return plan.following(owner)


def _describe(name: str, module: nn.Module, owners: Mapping[int, str]) -> LayerPlan:
    if isinstance(module, LowRankLinear):
        return LayerPlan(
            name,
            module.layer_type,
            module.in_features,
            module.out_features,
            module.bias is not None and not module.added_bias,
            module.rank,
            module.relative_error,
            added_bias=module.added_bias,
            shares_down_with=None if module.owns_down else owners.get(id(module.down)),
            correction=module.base is not None,
            same_input=module.same_input,
            pivoted=isinstance(module.up, PivotedUp),
        )
    if isinstance(module, (QuantizedLinear, TiedLinear)):
        sizes = module.in_features, module.out_features
        was_copy = isinstance(module, TiedLinear) and module.was_copy
        plan = LayerPlan(name, module.layer_type, *sizes, module.bias is not None, was_copy=was_copy)
        return _as_narrower(plan, module)
    layer_type = layer_type_of(module)
    bias = module.bias is not None
    assert layer_type is not None  # of a linear layer
    if not layer_type.certain:  # its weight may be packed
        return LayerPlan(name, layer_type.name, module.in_features, module.out_features, bias)  # type: ignore[arg-type]
    rows, columns = layer_type.weight(module).shape
    return _as_narrower(LayerPlan(name, layer_type.name, columns, rows, bias), module)


def _as_narrower(plan: LayerPlan, module: nn.Module) -> LayerPlan:
    """Return ``plan``, which has the sizes of now, with those before the layer lost neurons, if it did."""
    before = features_before(module)
    if before is None:
        return plan
    rows, columns = plan.out_features, plan.in_features
    return replace(
        plan,
        out_features=before[0],
        in_features=before[1],
        kept_outputs=rows if rows < before[0] else None,
        kept_inputs=columns if columns < before[1] else None,
    )


def check_patterns(name: str, value: Sequence[str] | None) -> Sequence[str]:
    """Return the patterns, none for ``None``; raises `TargetError` if they are no list of strings."""
    return patterns(TargetError, may_be_empty=name != "targets")(name, value) or ()


def not_wanted(
    name: str,
    targets: Sequence[str] | None,
    ignore: Sequence[str],
    heads: Mapping[str, Sequence[str]],
) -> str | None:
    """Return why the user's patterns leave the layer alone; ``None`` if they do not.

    Args:
        name: Its name.
        targets: As for `draft`.
        ignore: As for `draft`.
        heads: The heads by layer, from `lowrank.inspection.heads.heads_of`.
    """
    if any(matches(name, pattern) for pattern in ignore):
        return "ignored"
    wanted = [pattern for pattern in targets or ["*"] if matches(name, pattern)]
    if not wanted:
        return "not among the targets"
    own = heads.get(name, ())
    if own and not any(head in pattern for head in own for pattern in wanted):
        return f"part of a head ({own[0]})"
    return None


def described(name: str, module: QuantizedModule) -> QuantizedWeight:
    """Describe a module that is quantized."""
    layer_type, bias, flags = EMBEDDING, False, (False, False)
    if isinstance(module, QuantizedLinear):
        layer_type, bias = module.layer_type, module.bias is not None
        flags = module.smooth_scale is not None, module.input_shift is not None
    return QuantizedWeight(
        name, layer_type, *module.shape, bias, module.scheme.name, module.scheme.group_size, *flags
    )

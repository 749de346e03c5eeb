"""Check a plan against a model before anything changes: all is validated, then all is swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lowrank.calibration.statistics import Stats
from lowrank.errors import PlanError, WeightError
from lowrank.inspection.contexts import check_can_train
from lowrank.inspection.eligibility import ineligible_modules, lost_neurons
from lowrank.inspection.inspection import Inspection
from lowrank.linalg.pivots import RESOLVING
from lowrank.linalg.svd import check_options, checked_weight
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    PivotedUp,
    QuantizedModule,
    TiedLinear,
    layer_type_of,
)
from lowrank.plans.layer_plan import LayerPlan, largest_shared_rank
from lowrank.plans.plan import Plan
from lowrank.surgery.factorization import (
    check_stats,
    weight_of,
)
from lowrank.surgery.neurons import check_statistics, layers_to_narrow
from lowrank.surgery.quantization_checks import check_quantized_weights

_Factorized = LowRankLinear, LowRankEmbedding


def check_request(seen: Inspection, plan: Plan, stats: Stats | None, seed: int) -> list[LayerPlan]:
    """Return the layers that `lowrank.apply` would factorize; raises as it does, and changes nothing."""
    check_can_train(seen.model)
    check_options(plan.tolerance, seed)
    blocked = _blocked(seen, plan)
    todo = _validate(seen, plan, blocked)
    if todo:
        check_stats(seen, plan, stats)
    check_quantized_weights(seen, plan, stats, blocked)
    check_statistics(seen, plan, layers_to_narrow(seen, plan, blocked), stats)
    return todo


def layers_to_factorize(seen: Inspection, plan: Plan) -> list[LayerPlan]:
    """Return the layers that ``plan`` factorizes; raises `PlanError` where it does not fit the model."""
    return _validate(seen, plan, _blocked(seen, plan))


def check_structure(model: nn.Module, plan: Plan) -> list[LayerPlan]:
    """Return the layers that `lowrank.surgery.replacement.restructure` would factorize; raises as it does."""
    seen = Inspection(model)
    check_quantized_weights(seen, plan, None, {}, loading=True)
    blocked = _blocked(seen, plan)
    layers_to_narrow(seen, plan, blocked, loading=True)
    return _validate(seen, plan, blocked, loading=True)


def _blocked(seen: Inspection, plan: Plan) -> dict[str, str]:
    """Return why layers and embeddings must stay as they are, whatever ``plan`` says."""
    return ineligible_modules(seen, plan.owners, seen.doubts_but(plan.overruled))


def _validate(
    seen: Inspection, plan: Plan, blocked: Mapping[str, str], loading: bool = False
) -> list[LayerPlan]:
    """Return the layers to factorize, or raise before anything has changed."""
    equal = plan.owners
    modules = dict(seen.model.named_modules())
    shared = plan.shared
    quantized = {stored.name: stored for stored in plan.quantized}
    todo = []
    if not loading:
        _check_heads(seen, plan)
    for layer in plan:
        module = modules.get(layer.name)
        if layer.tied_to is not None:
            _check_follower(layer, plan, modules)
            if layer.name in equal and not loading:
                _check_equal(seen, layer, plan, blocked)
            continue
        if layer.rank is None and not isinstance(module, _Factorized):
            continue
        if module is None:
            raise PlanError(
                f"{layer.name}: {type(seen.model).__name__} has no such layer. The plan is for {plan.model}."
            )
        if isinstance(module, _Factorized):
            _check_as_planned(module, layer, quantizes=f"{layer.name}.up" in quantized)
            continue
        why = blocked.get(layer.name) or lost_neurons(module)
        if why:
            raise PlanError(f"{layer.name}: this layer must stay dense: it {why}.")
        _check_layer(module, layer, shared=layer.shares_down_with is not None or layer.name in shared)
        alone = layer.shares_down_with is None and layer.name not in shared
        if layer.pivoted:
            _check_pivoted(layer, alone, None if loading else weight_of(module).dtype)
        if not loading:  # a checkpoint's ranks and weights are as they are
            if alone and not (layer.is_embedding and f"{layer.name}.down" in quantized):
                _check_pays(layer)  # few bits per row make up for a high rank
            _check_weight(module, layer)
        todo.append(layer)
    for name, layers in shared.items():
        _check_shared(name, layers, modules, loading)
    return todo


def _check_pivoted(layer: LayerPlan, alone: bool, dtype: torch.dtype | None) -> None:
    """Refuse pivoted factors for what cannot have them; ``dtype`` of the weight, unless it is loaded."""
    why = None
    if layer.is_embedding or layer.correction:
        why = "only the factors that replace a linear layer's weight can be"
    elif not alone:
        why = "factors that share down with other layers cannot be"
    elif dtype not in (None, *RESOLVING):
        why = f"in {str(dtype).removeprefix('torch.')} pivots would blow up rounding errors"
    elif (layer.rank or 0) >= min(layer.in_features, layer.out_features):
        why = f"rank {layer.rank} leaves no row to compute from them"
    if why is not None:
        raise PlanError(f"{layer.name}: the plan says pivoted factors, but {why}. Set pivoted to false.")


def _check_as_planned(
    module: LowRankLinear | LowRankEmbedding, layer: LayerPlan, quantizes: bool = False
) -> None:
    """Refuse a layer that is factorized already, and otherwise than planned.

    Pivoted factors become plain ones where they are going to be quantized (``quantizes``).
    """
    corrects = isinstance(module, LowRankLinear) and module.base is not None
    pivoted = isinstance(module, LowRankLinear) and isinstance(module.up, PivotedUp) and not quantizes
    if (module.rank, corrects, pivoted) != (layer.rank, layer.correction, layer.pivoted):
        form = f"{'as a correction, ' if corrects else ''}{'pivoted, ' if pivoted else ''}"
        found = f"{form}at rank {module.rank}"
        raise PlanError(
            f"{layer.name}: factorized already, {found}; the plan says "
            f"{'correction, ' if layer.correction else ''}{'pivoted, ' if layer.pivoted else ''}"
            f"{layer.rank or 'dense'}. "
            "Call decompress(model) first, or start from the dense checkpoint."
        )


def _check_shared(
    name: str, layers: Sequence[LayerPlan], modules: Mapping[str, nn.Module], loading: bool
) -> None:
    """Check that ``layers`` can use the ``down`` of the layer called ``name``, the first of them."""
    owner = layers[0]
    for layer in (layer for layer in layers if layer.shares_down_with == name):
        if owner.name != name or owner.shares_down_with is not None:
            raise PlanError(
                f"{layer.name}: is to use the down of {name}, which has none of its own in the plan."
            )
        if (layer.rank, layer.in_features) != (owner.rank, owner.in_features):
            raise PlanError(
                f"{layer.name}: is to use the down of {name}, but has rank {layer.rank} and "
                f"{layer.in_features} inputs where that has rank {owner.rank} and {owner.in_features}."
            )
    if len({layer.same_input for layer in layers if layer.shares_down_with is not None}) > 1:
        raise PlanError(
            f"{name}: by the plan only some of the layers that use its down read the same input. "
            "Set same_input of all of them, or of none."
        )
    done = {layer.name for layer in layers if isinstance(modules.get(layer.name), LowRankLinear)}
    if done and len(done) < len(layers):
        raise PlanError(
            f"{name}: shares its down with other layers, but only some of them are factorized. "
            "Call decompress(model) first, or start from the dense checkpoint."
        )
    if loading or done:
        return
    weights = [modules[layer.name].weight for layer in layers]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        raise PlanError(f"{name}: layers that share a down must have one dtype and one device.")
    largest = largest_shared_rank(layers)
    if owner.rank is not None and owner.rank > largest:
        raise PlanError(
            f"{name}: joint rank {owner.rank} of {len(layers)} layers does not save parameters.\n"
            f"  Use a rank of at most {largest}, or let each have factors of its own."
        )


def _check_heads(seen: Inspection, plan: Plan) -> None:
    """Check that no embedding is replaced without the heads that are tied to it."""
    compressed = {layer.name for layer in plan.factorized} | {stored.name for stored in plan.quantized}
    for head, embedding in seen.tied_heads.items():
        if embedding in compressed and (head not in plan or plan[head].tied_to != embedding):
            raise PlanError(
                f"{embedding}: the plan changes this embedding, but not {head}, which is tied to it. Make "
                "the plan "
                f"for this model, so that {head} is the same as {embedding} in it."
            )


def _check_follower(layer: LayerPlan, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Check that ``layer`` can use the weight of what the plan names."""
    module, embedding = modules.get(layer.name), modules.get(layer.tied_to or "")
    if isinstance(module, TiedLinear):
        if module.owner is not embedding:
            raise PlanError(f"{layer.name}: the plan says that it uses {layer.tied_to}, but it uses another.")
        return
    owners = nn.Embedding, *_Factorized, QuantizedModule
    if embedding is None or not (isinstance(embedding, owners) or layer_type_of(embedding) is not None):
        raise PlanError(
            f"{layer.name}: is to use the weight of {layer.tied_to}, which is no embedding or linear layer "
            "here."
        )
    if module is None or (layer.rank is not None and layer.tied_to not in plan):
        raise PlanError(
            f"{layer.name}: the model or the plan lacks it, or {layer.tied_to}, which it is to use."
        )
    _check_layer(module, replace(layer, rank=None), shared=False)
    rows, columns = _sizes(embedding)
    if (layer.out_features, layer.in_features) != (rows, columns):
        raise PlanError(
            f"{layer.name}: is to use the weight of {layer.tied_to}, which has another shape: "
            f"{rows} rows of {columns}."
        )


def _sizes(owner: nn.Module) -> tuple[int, int]:
    """Return the shape ``(rows, columns)`` of the weight of an embedding or layer, however it is stored."""
    if isinstance(owner, LowRankLinear):
        return owner.out_features, owner.in_features
    if isinstance(owner, LowRankEmbedding):
        return owner.num_embeddings, owner.embedding_dim
    if isinstance(owner, QuantizedModule):
        return owner.shape
    rows, columns = weight_of(owner).shape
    return rows, columns


def _check_equal(seen: Inspection, layer: LayerPlan, plan: Plan, blocked: Mapping[str, str]) -> None:
    """Check that a linear layer has the weight that it is to use of another, if that is to change."""
    owner = layer.tied_to or ""
    if layer not in plan.tied or isinstance(seen.model.get_submodule(layer.name), TiedLinear):
        return
    if layer.name in blocked:
        raise PlanError(f"{layer.name}: cannot use the weight of {owner}: it {blocked[layer.name]}.")
    if plan[owner].tied_to is not None or not seen.equal_layers([owner, layer.name]):
        raise PlanError(
            f"{layer.name}: is to use the weight of {owner}, but has another. Make the plan for this model."
        )


def _check_layer(module: nn.Module, layer: LayerPlan, shared: bool) -> None:
    layer_type = layer_type_of(module)
    name = (
        LowRankEmbedding.layer_type if isinstance(module, nn.Embedding) else getattr(layer_type, "name", None)
    )
    if name != layer.layer_type:
        raise PlanError(
            f"{layer.name}: the plan says {layer.layer_type}, the model has a {type(module).__name__}."
        )
    shape = tuple(weight_of(module).shape)
    if shape != (layer.out_features, layer.in_features):
        raise PlanError(
            f"{layer.name}: the plan is for a weight (out={layer.out_features}, in={layer.in_features}), "
            f"the model's is (out={shape[0]}, in={shape[1]}). Make a plan for this model."
        )
    largest = shape[1] if shared else min(shape)  # joint factors have as many rows as all weights together
    if layer.rank is not None and layer.rank > largest:
        raise PlanError(
            f"{layer.name}: rank {layer.rank} is above {'in' if shared else 'min(out, in)'} = {largest} of "
            "the weight."
        )


def _check_pays(layer: LayerPlan) -> None:
    rank = layer.rank or 0
    if rank > layer.break_even_rank:
        raise PlanError(
            f"{layer.name}: rank {rank} does not save parameters.\n"
            f"  The weight (out={layer.out_features}, in={layer.in_features}) has "
            f"{layer.dense_parameters:,} parameters; rank {rank} needs {layer.parameters_at(rank):,}.\n"
            f"  Use a rank of at most {layer.break_even_rank}, or keep this layer dense."
        )


def _check_weight(module: nn.Module, layer: LayerPlan) -> None:
    try:
        checked_weight(module.weight)  # type: ignore[arg-type]
    except WeightError as error:
        raise WeightError(f"{layer.name}: {error}") from error

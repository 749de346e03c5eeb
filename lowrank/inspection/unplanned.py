"""Find the parameters of a model that no layer of a plan has, with the reason for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lowrank.inspection.eligibility import ineligible_embeddings
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.layers import dense_elements, other_parameters
from lowrank.inspection.tied_weights import place_of
from lowrank.nn import LowRankEmbedding, QuantizedEmbedding, TiedLinear
from lowrank.plans.plan import Plan
from lowrank.plans.reach import LISTED, UnplannedWeight

_RECURRENT = nn.RNNBase, nn.RNNCellBase


def with_reach(seen: Inspection, plan: Plan) -> Plan:
    """Return ``plan`` with the number of the model's parameters, and those in none of its layers."""
    planned = {layer.name for layer in plan} | {stored.name for stored in plan.quantized}
    covered, others = 0, []
    for name, module in _matrices(seen):
        if name in planned or isinstance(module, QuantizedEmbedding):
            covered += dense_elements(module)
        else:
            others.append((name, module))
    weights = [*_embeddings(seen, plan, others), *_others(seen.model)]
    total = covered + sum(weight.parameters for weight in weights)
    return replace(plan, model_parameters=total, unplanned=_with_small_ones_together(weights, total))


def _matrices(seen: Inspection) -> Iterator[tuple[str, nn.Module]]:
    """Yield the embeddings and then the linear layers, each weight once."""
    quantized = ((n, m) for n, m in seen.model.named_modules() if isinstance(m, QuantizedEmbedding))
    factors = {
        f"{name}.down"
        for name, embedding in seen.embeddings.items()
        if isinstance(embedding, LowRankEmbedding)
    }
    known: set[int] = set()
    for name, module in [*seen.embeddings.items(), *quantized, *seen.linear.items()]:
        weight: Tensor = module.weight  # type: ignore[assignment]
        place = place_of(weight) if isinstance(weight, nn.Parameter) else id(module)
        if place not in known and name not in factors and not isinstance(module, TiedLinear):
            known.add(place)
            yield name, module


def _embeddings(
    seen: Inspection, plan: Plan, others: list[tuple[str, nn.Module]]
) -> Iterator[UnplannedWeight]:
    blocked = ineligible_embeddings(seen, seen.doubts_but(plan.overruled))
    for name, module in others:
        why = blocked.get(name)
        reason = "embedding that no target spells" if why is None else f"embedding that {why}"
        shape: tuple[int, ...] = tuple(module.weight.shape)  # type: ignore[arg-type,union-attr]
        yield UnplannedWeight(f"{name}.weight", shape, dense_elements(module), reason)


def _others(model: nn.Module) -> Iterator[UnplannedWeight]:
    for holder, module, own, parameter in other_parameters(model):
        name = f"{holder}.{own}" if holder else own
        reason = _reason(module, own, parameter)
        yield UnplannedWeight(name, tuple(parameter.shape), parameter.numel(), reason)


def _reason(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Say why a parameter of ``module`` is no weight of a linear layer."""
    class_name, dimensions = type(module).__name__, parameter.ndim
    if dimensions < 2:
        return "biases, norms and other vectors"
    if isinstance(module, _ConvNd):
        return f"convolution ({class_name})"
    if isinstance(module, _RECURRENT):
        return f"recurrent weights ({class_name})"
    if isinstance(module, nn.EmbeddingBag):
        return f"embedding ({class_name})"
    if isinstance(module, nn.MultiheadAttention):
        return f"{name} of {class_name}, which is in no layer of its own"
    if dimensions > 2:
        experts = ", experts" if "expert" in class_name.lower() else ""
        return f"weight in {dimensions} dimensions ({class_name}){experts}"
    return f"matrix of {class_name}, which is no linear layer"


def _with_small_ones_together(weights: list[UnplannedWeight], total: int) -> tuple[UnplannedWeight, ...]:
    """Return the large tensors each by itself, and the small ones of each reason as one."""
    found, small = [], dict[str, list[UnplannedWeight]]()
    for weight in weights:
        if weight.parameters > LISTED * total:
            found.append(weight)
        else:
            small.setdefault(weight.reason, []).append(weight)
    for several in small.values():
        elements = sum(weight.parameters for weight in several)
        found.append(replace(several[0], parameters=elements, tensors=len(several)))
    return tuple(found)

"""Choose which weights become integers: those of dense layers, of factors and of embeddings alike.

Weights are quantized after factorizing (`lowrank.plans.storage_formats` says why). So the choice is made on
a plan, for what the model will be once its layers are factorized.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lowrank.calibration.statistics import Stats
from lowrank.errors import LowRankError, SchemeError, SlowKernelWarning, TargetError, WeightError, warn
from lowrank.inspection.eligibility import find_equals, ineligible_modules
from lowrank.inspection.heads import heads_of
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import check_patterns, left_alone, not_wanted, spells
from lowrank.inspection.tied_weights import is_copy
from lowrank.linalg import Scheme
from lowrank.nn import LowRankEmbedding, LowRankLinear, PivotedUp, QuantizedModule, SharedDown
from lowrank.nn.integer_matmul import why_no_int4_kernel
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.patterns import matches, no_match
from lowrank.plans.plan import Plan
from lowrank.plans.storage_formats import StorageFormat
from lowrank.surgery.quantization_checks import check_range, without_shared_input_shifts


def with_quantized_weights(
    seen: Inspection,
    plan: Plan,
    scheme: Scheme,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    stats: Stats | None = None,
    optional: bool = False,
) -> Plan:
    """Return ``plan`` with what `lowrank.quantize` quantizes when the plan has been carried out.

    With ``optional`` there may be nothing left to quantize.

    Raises:
        TargetError: If a pattern matches nothing, or names what cannot be quantized.
        SchemeError: If a weight does not divide into groups.
        WeightError: If a weight is out of the range of int4.
        LowRankError: If nothing is left to code.
    """
    model = seen.model
    check_patterns("targets", targets)
    check_patterns("ignore", ignore)
    in_heads = heads_of(seen)
    doubts = seen.doubts_but(plan.overruled)
    plan = plan.with_layers(_equal(seen, plan, doubts, targets, ignore, in_heads))
    chosen = list(_chosen(seen, plan, doubts, scheme, targets, ignore, stats, in_heads))
    if not chosen and not optional:
        raise LowRankError(
            f"No weight of {type(model).__name__} is left to be quantized as {scheme.name}: those that "
            "could be "
            "are quantized already, ignored, or part of a head (name it in targets)."
        )
    modules = dict(model.named_modules())
    for stored in chosen:
        try:
            check_range(modules, stored)
        except (SchemeError, WeightError) as error:
            raise type(error)(f"{stored.name}: {error}") from error
    changed = {stored.name.rpartition(".")[0] for stored in chosen}
    pivoted = [layer for layer in plan if layer.pivoted and layer.name in changed]
    plan = plan.with_layers({layer.name: replace(layer, pivoted=False) for layer in pivoted})
    return with_heads(seen, without_shared_input_shifts(replace(plan, quantized=(*plan.quantized, *chosen))))


def _equal(
    seen: Inspection,
    plan: Plan,
    doubts: Mapping[str, str],
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
    heads: Mapping[str, Sequence[str]],
) -> dict[str, LayerPlan]:
    """Return those layers of ``plan`` that stay whole and are going to use the codes of an equal one."""
    taken = plan.equal.keys()
    wanted = [
        layer.name
        for layer in plan
        if (layer.rank, layer.tied_to) == (None, None)
        and layer.name not in taken
        and not_wanted(layer.name, targets, ignore or (), heads) is None
    ]
    equal = find_equals(seen, wanted, doubts)
    return {
        name: replace(plan[name].following(owner), was_copy=is_copy(seen.modules, name, owner))
        for name, owner in equal.items()
    }


def with_heads(seen: Inspection, plan: Plan) -> Plan:
    """Return ``plan`` with the heads that are tied to embeddings which it quantizes: they use the codes."""
    embeddings = {stored.name for stored in plan.quantized if stored.is_embedding}
    using = {
        head: plan[head].following(embedding)
        for head, embedding in seen.tied_heads.items()
        if embedding in embeddings and head in plan
    }
    return plan.with_layers(using)


def check_kernels(model: nn.Module, plan: Plan, on_missing_kernel: str) -> None:
    """Look for int4 weights of linear layers that ``plan`` is going to code, and no kernel multiplies by.

    Raises:
        SchemeError: If there are any and ``on_missing_kernel`` is ``"refuse"``. ``"warn"`` gives one
            `SlowKernelWarning` for all, ``"allow"`` nothing.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    for stored in plan.quantized:
        module = modules.get(stored.name, modules.get(stored.name.rpartition(".")[0]))
        if (
            stored.group_size is None
            or stored.is_embedding
            or module is None
            or isinstance(module, QuantizedModule)
        ):
            continue
        device = next(itertools.chain(module.parameters(), module.buffers())).device
        reason = why_no_int4_kernel(stored.rows, stored.columns, stored.group_size, device)
        if reason is not None:
            found.setdefault(reason, []).append(stored.name)
    if not found or on_missing_kernel == "allow":
        return
    reasons = ", ".join(f"{len(names)} since {why} (the first: {names[0]})" for why, names in found.items())
    message = (
        f"{sum(map(len, found.values()))} int4 weights of linear layers have to be dequantized at every "
        "call, "
        f"which is slower than floating point: {reasons}. Use int8, or ranks and a group_size that fit; or "
        "accept it with on_missing_kernel='allow'."
    )
    if on_missing_kernel == "refuse":
        raise SchemeError(message)
    warn(message, SlowKernelWarning)


def _chosen(
    seen: Inspection,
    plan: Plan,
    doubts: Mapping[str, str],
    scheme: Scheme,
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
    stats: Stats | None,
    heads: Mapping[str, Sequence[str]],
) -> Iterator[QuantizedWeight]:
    modules = {**seen.linear, **seen.embeddings}
    for pattern in [*check_patterns("targets", targets), *check_patterns("ignore", ignore)]:
        if not any(matches(name, pattern) for name in modules):
            raise no_match(
                pattern, list(modules), f"linear layers and embeddings of {type(seen.model).__name__}"
            )
    layers = {layer.name: layer for layer in plan}
    uses = Counter(id(module) for module in modules.values())
    equal = plan.owners
    blocked = ineligible_modules(seen, equal, doubts)
    done = {stored.name for stored in plan.quantized}
    tied = seen.tied_heads
    for name, module in modules.items():
        group = [head for head, embedding in tied.items() if embedding == name]
        named = any(spells(pattern, head) for head in group for pattern in targets or ())
        if name in tied and tied[name] not in blocked:
            continue  # its embedding decides
        if name in equal and name not in blocked:
            continue  # the layer whose weight it uses decides
        if (not_wanted(name, targets, ignore or (), heads) and not named) or left_alone(
            name, group, ignore or ()
        ):
            continue
        layer = layers.get(name)
        known = stats is not None and name in stats
        if isinstance(module, (LowRankLinear, LowRankEmbedding)):
            own = isinstance(module, LowRankEmbedding) or module.owns_down
            parts = (module.down, module.up) if own else (module.up,)
            plain = all(type(part) in _PLAIN and not part.weight.is_meta for part in parts)
            if layer is not None and plain and uses[id(module)] == 1:
                yield from _linear(replace(layer, pivoted=False), plan, scheme, known, done)
        elif name not in blocked and layer is not None:
            yield from _linear(layer, plan, scheme, known, done)
        elif name not in blocked and isinstance(module, nn.Embedding):
            if name not in done:
                yield _embedding(name, module, scheme)
        elif name in (targets or ()):
            raise TargetError(
                f"{name}: this weight cannot be quantized: it {blocked[name]}. Take it out of targets."
            )


_PLAIN = (nn.Linear, SharedDown, nn.Embedding, PivotedUp)


def _linear(
    layer: LayerPlan, plan: Plan, scheme: Scheme, calibrated: bool, done: Container[str]
) -> Iterator[QuantizedWeight]:
    """Yield what of a layer, or of its factors, is not quantized by the plan already."""
    storage_format = StorageFormat(scheme, layer.correction)
    for stored in storage_format.quantized(layer, shared=layer.name in plan.shared, calibrated=calibrated):
        if stored.name not in done:
            yield stored


def _embedding(name: str, embedding: nn.Embedding, scheme: Scheme) -> QuantizedWeight:
    sizes = embedding.num_embeddings, embedding.embedding_dim
    return QuantizedWeight(name, "embedding", *sizes, False, scheme.name, scheme.group_size)

"""The only file that replaces modules: `apply` a plan, `quantize_weights` weights, or `decompress` a model.

Everything is validated before anything is swapped. Then layer after layer is factorized
(`lowrank.surgery.factorization`), swapped, and its dense weight freed, so that the extra memory is
that of one layer's decomposition.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.statistics import Stats
from lowrank.errors import LowRankError, WeightError
from lowrank.inspection.devices import device_of
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.interrupts import uninterrupted
from lowrank.inspection.layers import check_holder
from lowrank.inspection.tied_weights import followers
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.pivots import pivots
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    PivotedUp,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    TiedLinear,
    layer_type_named,
    layer_type_of,
    register_layer_type,
)
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.plan import Plan
from lowrank.plans.stored_tensors import scheme_of
from lowrank.surgery.empty_modules import empty_embedding, empty_linear, empty_quantized
from lowrank.surgery.factorization import (
    corrected,
    factorized,
    follower,
    jointly_factorized,
    merged,
    metric_of,
    weight_of,
)
from lowrank.surgery.inheritance import adopt, check_no_hooks
from lowrank.surgery.neurons import (
    Narrower,
    empty_layers,
    layers_to_narrow,
    narrower_layers,
    statistics_of_kept,
)
from lowrank.surgery.quantization import even_out, quantized_module, readers_of, rotate
from lowrank.surgery.quantization_checks import base_of
from lowrank.surgery.validation import check_request, check_structure, layers_to_factorize

_Factorized = LowRankLinear, LowRankEmbedding


def apply_plan(
    seen: Inspection,
    plan: Plan,
    stats: Stats | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Replace layers by their factors, then weights by integers; `lowrank.apply` tells the arguments."""
    todo = check_request(seen, plan, stats, seed)
    register_overruled(seen.model, plan)
    seen.release()
    kept = replace_layers(seen.model, plan, todo, stats, seed=seed, progress=progress)
    quantize_weights(seen.model, plan, statistics_of_kept(stats, kept), seed=seed, progress=progress)


@without_autocast()
def replace_layers(
    model: nn.Module,
    plan: Plan,
    todo: Sequence[LayerPlan],
    stats: Stats | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Replace the layers of ``todo`` by their factors, and those of ``plan`` by narrower ones that are to be.

    `check_request` has accepted both. Narrower layers are made before anything changes.

    Returns:
        By name of the layers that now read fewer inputs, which of the old ones these are.
    """
    narrower = list(narrower_layers(model, plan, layers_to_narrow(Inspection(model), plan, {}), stats))
    _factorize_all(model, plan, todo, stats, seed, progress)
    _narrow(model, narrower)
    return {new.name: new.kept for new in narrower if new.kept is not None}


def _factorize_all(
    model: nn.Module,
    plan: Plan,
    todo: Sequence[LayerPlan],
    stats: Stats | None,
    seed: int,
    progress: bool,
) -> None:
    joint = merged(stats, plan)
    bar = tqdm(total=len(todo), desc="factorizing", unit="layer", disable=None if progress else True)
    with bar, _all_or_none(model, plan, todo):
        for layers in _together(plan, todo):
            bar.set_postfix_str(layers[0].name)
            with uninterrupted():
                _factorize(model, layers, plan, joint, seed)  # whose dense weights are gone when it returns
            bar.update(len(layers))


def _narrow(model: nn.Module, narrower: Sequence[Narrower]) -> None:
    """Put narrower layers in the places of those that they were made from, all of them or none."""
    with uninterrupted(), torch.no_grad():
        for new in narrower:
            old = model.get_submodule(new.name)
            replace_module(model, new.name, adopt(new.layer, old))
            if new.bias is not None:
                old.bias.copy_(new.bias)  # type: ignore[union-attr,operator]


@contextlib.contextmanager
def _all_or_none(model: nn.Module, plan: Plan, todo: Sequence[LayerPlan]) -> Iterator[None]:
    """Put the layers of ``todo`` back if the factors of one leave the range of their dtype.

    Under a metric they can be much larger than the weight, and float16 may not hold them. So there the dense
    weights are kept until all layers are done; in other dtypes they are freed one by one.
    """
    names = [user.name for layer in todo for user in (layer, *plan.equal.get(layer.name, ()))]
    narrow = any(model.get_submodule(name).weight.dtype == torch.float16 for name in names)  # type: ignore[union-attr]
    if plan.metric == "weight" or not narrow:
        yield
        return
    dense = {name: model.get_submodule(name) for name in names}
    parameters = [named for module in dense.values() for named in module.named_parameters()]
    biases = [(bias, bias.detach().clone()) for name, bias in parameters if name == "bias"]
    try:
        yield
    except WeightError:
        for name, old in dense.items():
            new = model.get_submodule(name)
            replace_module(model, name, old if new is old else adopt(old, new))
        with torch.no_grad():
            for bias, value in biases:
                bias.copy_(value)
        raise


@without_autocast()
@torch.no_grad()
def pivot_layers(model: nn.Module, plan: Plan) -> None:
    """Store the factors of those layers in pivoted form that ``plan`` wants so; their products stay."""
    for layer in plan.factorized:
        small = model.get_submodule(layer.name)
        if layer.pivoted and isinstance(small, LowRankLinear) and not isinstance(small.up, PivotedUp):
            found = pivots(small.up.weight, small.down.weight)
            with uninterrupted():
                small.down.weight.copy_(found.rows)
                small.up = adopt(PivotedUp.from_pivots(found, small.bias), small.up)  # type: ignore[assignment]


@without_autocast()
def quantize_weights(
    model: nn.Module, plan: Plan, stats: Stats | None = None, *, seed: int = 0, progress: bool = False
) -> None:
    """Put integers in place of the weights that ``plan`` quantizes, which `check_request` has accepted."""
    stats = merged(stats, plan, centred=False)
    todo = [
        stored
        for stored in plan.quantized
        if not isinstance(model.get_submodule(stored.name), QuantizedModule)
    ]
    todo.sort(key=lambda stored: stored.name.endswith(".up"))  # a down needs its up in floating point
    names = {stored.name: scheme_of(stored) for stored in todo}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear) and isinstance(module.up, PivotedUp) and f"{name}.up" in names:
            module.up = adopt(module.up.plain(), module.up)
    for name, module in model.named_modules():
        if isinstance(module, _Factorized) and {f"{name}.down", f"{name}.up"} <= names.keys():
            readers = readers_of(model, module) if isinstance(module, LowRankLinear) else {name: module}
            if {f"{reader}.up" for reader in readers} <= names.keys():
                with uninterrupted():
                    mixed = names[f"{name}.down"].storage.columns is not None
                    if mixed and isinstance(module, LowRankEmbedding):
                        even_out(module, metric_of(plan[name], plan.metric, stats))
                    else:
                        rotate(list(readers.values()), seed)
    for stored in tqdm(todo, desc="quantizing", unit="weight", disable=None if progress else True):
        with uninterrupted():
            _quantize_weight(model, stored, plan, stats)


def _quantize_weight(model: nn.Module, stored: QuantizedWeight, plan: Plan, stats: Stats | None) -> None:
    """Put integers in place of one weight, and let a bias take up the mean of its inputs."""
    old = model.get_submodule(stored.name)
    new, mean = quantized_module(model, stored, stats)
    replace_module(model, stored.name, adopt(new, old))
    _follow(model, plan, stored.name)
    if mean is not None:
        holder = model.get_submodule(stored.name.rpartition(".")[0])
        taker = holder.bias if isinstance(holder, LowRankLinear) else new.bias
        with torch.no_grad():
            taker.add_(mean.to(taker.dtype))  # type: ignore[operator,union-attr,arg-type]


def register_overruled(model: nn.Module, plan: Plan) -> None:
    """Let the classes of the layers that ``plan`` overrules be found again by their names."""
    modules = dict(model.named_modules())
    for name in plan.overruled & modules.keys():
        layer_type = layer_type_of(modules[name])
        if layer_type is not None:
            register_layer_type(layer_type)


def _factorize(
    model: nn.Module, layers: Sequence[LayerPlan], plan: Plan, stats: Stats | None, seed: int
) -> None:
    """Replace one layer, or those that share a ``down``."""
    dense = [model.get_submodule(layer.name) for layer in layers]
    new: Sequence[nn.Module]
    try:
        if layers[0].correction:
            new = [corrected(dense[0], layers[0], base_of(plan, layers[0]), plan, stats, seed)]
        elif len(layers) == 1:
            new = [factorized(dense[0], layers[0], plan, stats, seed)]
        else:
            new = jointly_factorized(dense, layers, plan, stats, seed)
    except WeightError as error:
        raise type(error)(f"{layers[0].name}: {error}") from error
    for layer, old, small in zip(layers, dense, new, strict=True):
        replace_module(model, layer.name, adopt(small, old))
        for user in plan.equal.get(layer.name, ()):
            alike = model.get_submodule(user.name)
            tied = follower(alike, small, user, plan, stats)  # type: ignore[arg-type]
            replace_module(model, user.name, adopt(tied, alike))
        _follow(model, plan, layer.name)


def _follow(model: nn.Module, plan: Plan, owner: str) -> None:
    """Let the layers that use the weight of the module called ``owner`` use it as it is now."""
    whole = model.get_submodule(owner)
    for layer in plan.layers:
        old = model.get_submodule(layer.name) if layer.tied_to == owner else None
        if old is not None and not isinstance(old, TiedLinear):
            bias: nn.Parameter | None = old.bias  # type: ignore[assignment]
            new = TiedLinear(whole, bias, layer_type=layer.layer_type, was_copy=layer.was_copy)  # type: ignore[arg-type]
            replace_module(model, layer.name, adopt(new, old))


def _together(plan: Plan, todo: Sequence[LayerPlan]) -> Iterator[tuple[LayerPlan, ...]]:
    """Yield the layers one by one, but those that share a ``down`` together, its owner first."""
    shared = plan.shared
    for layer in todo:
        if layer.shares_down_with is None:
            yield shared.get(layer.name, (layer,))


@contextlib.contextmanager
def sketched(seen: Inspection, plan: Plan) -> Iterator[None]:
    """Give the model the structure of ``plan`` for a while, with factors of zeros: to time it."""
    kept: dict[str, nn.Module] = {}
    model = seen.model
    try:
        for name, narrower in list(empty_layers(model, plan, device_of(model))):
            kept[name] = model.get_submodule(name)
            replace_module(model, name, narrower.eval())
        for layer in layers_to_factorize(seen, plan):
            dense = model.get_submodule(layer.name)
            weight: Tensor = dense.weight  # type: ignore[assignment]
            rank = layer.rank or 0
            left, right = (
                weight.new_zeros(layer.out_features, rank),
                weight.new_zeros(rank, layer.in_features),
            )
            bias = nn.Parameter(weight.new_zeros(layer.out_features)) if layer.has_bias else None
            kept[layer.name] = dense
            small = LowRankLinear.from_factors(left, right, bias).eval()
            replace_module(model, layer.name, small)
            for user in plan.equal.get(layer.name, ()):
                kept[user.name] = model.get_submodule(user.name)
                replace_module(model, user.name, TiedLinear(small, kept[user.name].bias).eval())  # type: ignore[arg-type]
        yield
    finally:
        for name, dense in kept.items():
            replace_module(model, name, dense)


def restructure(model: nn.Module, plan: Plan) -> nn.Module:
    """Give ``model`` the structure of ``plan`` with factors that have no data, on the meta device.

    The dense weights are dropped unread; biases stay. Loading a checkpoint fills the factors.

    Raises:
        PlanError: As `apply`.
    """
    todo, shared = check_structure(model, plan), plan.shared
    register_overruled(model, plan)
    for name, new in list(empty_layers(model, plan)):
        replace_module(model, name, adopt(new, model.get_submodule(name)))
    for layer in itertools.chain.from_iterable(_together(plan, todo)):
        dense = model.get_submodule(layer.name)
        if isinstance(dense, nn.Embedding):
            replace_module(model, layer.name, adopt(empty_embedding(layer, dense), dense))
            continue
        layer_type = layer_type_of(dense)
        assert layer_type is not None  # _validate has refused everything else
        weight = layer_type.weight(dense)
        bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
        if bias is None and layer.added_bias:
            bias = nn.Parameter(torch.empty(layer.out_features, device="meta", dtype=weight.dtype))
        new = LowRankLinear.from_factors(
            torch.empty(layer.out_features, layer.rank or 0, device="meta", dtype=weight.dtype),
            torch.empty(layer.rank or 0, layer.in_features, device="meta", dtype=weight.dtype),
            bias,
            layer_type=layer.layer_type,
            shared=layer.shares_down_with is not None or layer.name in shared,
            relative_error=layer.relative_error,
            added_bias=layer.added_bias,
            base=empty_linear(base_of(plan, layer), weight.dtype) if layer.correction else None,
        )
        if layer.pivoted:
            new.up = PivotedUp(  # type: ignore[assignment]
                new.rank, new.out_features, bias, device="meta", dtype=weight.dtype
            )
        if layer.shares_down_with is not None:
            new.share_down_with(model.get_submodule(layer.shares_down_with), layer.same_input)  # type: ignore[arg-type]
        replace_module(model, layer.name, adopt(new, dense))
    for stored in plan.quantized:
        old = model.get_submodule(stored.name)
        if not isinstance(old, QuantizedModule):
            replace_module(model, stored.name, adopt(empty_quantized(stored, old), old))
    for owner in {layer.tied_to for layer in plan.tied}:
        _follow(model, plan, owner)  # type: ignore[arg-type]
    return model


@without_autocast()
def decompress(model: nn.Module) -> nn.Module:
    """Replace factorized layers by dense ones; see `lowrank.decompress`."""
    check_holder(model)
    users = followers(model)
    lost = next((name for name, owner in users.items() if not owner), None)
    if lost is not None:
        raise LowRankError(
            f"{lost}: uses the weight of a module outside of this one. Pass the model that has both."
        )
    for name, module in model.named_modules():
        if isinstance(module, (LowRankLinear, QuantizedLinear)):
            layer_type_named(module.layer_type)  # all are known, or nothing changes
        if isinstance(module, _Factorized):
            check_no_hooks(name, module)
    for cls in (
        LowRankLinear,
        LowRankEmbedding,
        QuantizedModule,
    ):  # what consists of quantized parts before these
        for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, cls)]:
            replace_module(model, name, adopt(_dense_form(module), module))
    for name, owner in users.items():
        whole, user = model.get_submodule(owner), model.get_submodule(name)
        assert isinstance(user, TiedLinear)
        layer = adopt(layer_type_named(user.layer_type).layer(weight_of(whole).detach(), user.bias), user)
        weight: nn.Parameter = whole.weight  # type: ignore[assignment]
        own = nn.Parameter(weight.detach().clone(), user.trainable) if user.was_copy else weight
        layer.weight = own
        replace_module(model, name, layer)
    return model


@torch.no_grad()
def _dense_form(module: nn.Module) -> nn.Module:
    """Make the dense layer or embedding that ``module`` stands for."""
    if isinstance(module, (LowRankLinear, QuantizedLinear)):
        return layer_type_named(module.layer_type).layer(module.dense_weight(), module.dense_bias())
    assert isinstance(module, (LowRankEmbedding, QuantizedEmbedding))
    sizes = module.num_embeddings, module.embedding_dim
    return nn.Embedding(*sizes, module.padding_idx, _weight=module.dense_weight(), _freeze=False)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place that the dotted ``name`` gives."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new

"""The only file that replaces modules: `apply` a plan, `quantize_weights` weights, or `decompress` a model.

Everything is validated before anything is swapped. Then layer after layer is factorized
(`lowrank.surgery.factorization`), swapped, and its dense weight freed, so that the extra memory is
that of one layer's decomposition.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.statistics import Stats
from lowrank.errors import LowRankError, PlanError, WeightError
from lowrank.inspection.contexts import check_can_train, uninterrupted
from lowrank.inspection.eligibility import check_holder, check_model, find_all_obstacles, find_doubts
from lowrank.inspection.tied_weights import equal_layers, followers, tied_heads
from lowrank.linalg.matmul import without_autocast
from lowrank.linalg.svd import check_options, checked_weight
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    SharedDown,
    SharedQuantizedDown,
    TiedLinear,
    layer_type_named,
    layer_type_of,
    register_layer_type,
)
from lowrank.plans.plan import LayerPlan, Plan, QuantizedWeight, largest_shared_rank
from lowrank.plans.storage_formats import scheme_of
from lowrank.surgery.factorization import (
    check_stats,
    corrected,
    factorized,
    follower,
    jointly_factorized,
    pooled,
    weight_of,
)
from lowrank.surgery.inheritance import adopt, check_no_hooks
from lowrank.surgery.quantization import base_of, check_codes, quantized_module, readers_of, rotate

_Factorized = LowRankLinear, LowRankEmbedding


@without_autocast()
def apply(
    model: nn.Module,
    plan: Plan,
    stats: Stats | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Replace layers by their factors; the arguments and errors are those of `lowrank.apply`."""
    todo = check_request(model, plan, stats, seed)
    register_overruled(model, plan)
    joint = pooled(stats, plan)
    bar = tqdm(total=len(todo), desc="factorizing", unit="layer", disable=None if progress else True)
    with bar, _all_or_none(model, plan, todo):
        for layers in _together(plan, todo):
            bar.set_postfix_str(layers[0].name)
            with uninterrupted():
                _factorize(model, layers, plan, joint, seed)  # whose dense weights are gone when it returns
            bar.update(len(layers))
    quantize_weights(model, plan, stats, seed=seed, progress=progress)
    return model


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
def quantize_weights(
    model: nn.Module, plan: Plan, stats: Stats | None = None, *, seed: int = 0, progress: bool = False
) -> None:
    """Put integers in place of the weights that ``plan`` codes, which `check_request` has accepted."""
    stats = pooled(stats, plan, centred=False)
    todo = [
        code for code in plan.quantized if not isinstance(model.get_submodule(code.name), QuantizedModule)
    ]
    todo.sort(key=lambda code: code.name.endswith(".up"))  # a down needs its up in floating point
    names = {code.name for code in todo}
    for name, module in model.named_modules():
        if isinstance(module, _Factorized) and {f"{name}.down", f"{name}.up"} <= names:
            readers = readers_of(model, module) if isinstance(module, LowRankLinear) else {name: module}
            if {f"{reader}.up" for reader in readers} <= names:
                with uninterrupted():
                    rotate(list(readers.values()), seed)
    for code in tqdm(todo, desc="coding", unit="weight", disable=None if progress else True):
        with uninterrupted():
            _quantize_weight(model, code, plan, stats)


def _quantize_weight(model: nn.Module, code: QuantizedWeight, plan: Plan, stats: Stats | None) -> None:
    """Put integers in place of one weight, and let a bias take up the mean of its inputs."""
    old = model.get_submodule(code.name)
    new, mean = quantized_module(model, code, stats)
    replace_module(model, code.name, adopt(new, old))
    _follow(model, plan, code.name)
    if mean is not None:
        holder = model.get_submodule(code.name.rpartition(".")[0])
        taker = holder.bias if isinstance(holder, LowRankLinear) else new.bias
        with torch.no_grad():
            taker.add_(mean.to(taker.dtype))  # type: ignore[operator,union-attr,arg-type]


def check_request(model: nn.Module, plan: Plan, stats: Stats | None, seed: int) -> list[LayerPlan]:
    """Return the layers that `apply` would factorize; raises as it does, and changes nothing."""
    check_model(model)
    if not isinstance(plan, Plan):
        raise PlanError(f"apply needs a Plan, not {type(plan).__name__}. Make one with plan(model, ...).")
    check_can_train(model)
    check_options(plan.tolerance, seed)
    blocked = _blocked(model, plan)
    todo = _validate(model, plan, blocked)
    if todo:
        check_stats(model, plan, stats)
    check_codes(model, plan, stats, blocked)
    return todo


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
def sketched(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Give ``model`` the structure of ``plan`` for a while, with factors of zeros: to time it."""
    kept: dict[str, nn.Module] = {}
    try:
        for layer in _validate(model, plan, _blocked(model, plan)):
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
    for layer in itertools.chain.from_iterable(_together(plan, todo)):
        dense = model.get_submodule(layer.name)
        if isinstance(dense, nn.Embedding):
            replace_module(model, layer.name, adopt(_embedding_without_data(layer, dense), dense))
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
            base=_empty_linear(base_of(plan, layer), weight.dtype) if layer.correction else None,
        )
        if layer.shares_down_with is not None:
            new.share_down_with(model.get_submodule(layer.shares_down_with), layer.same_input)  # type: ignore[arg-type]
        replace_module(model, layer.name, adopt(new, dense))
    for code in plan.quantized:
        old = model.get_submodule(code.name)
        if not isinstance(old, QuantizedModule):
            replace_module(model, code.name, adopt(_without_data(code, old), old))
    for owner in {layer.tied_to for layer in plan.tied}:
        _follow(model, plan, owner)  # type: ignore[arg-type]
    return model


def _embedding_without_data(layer: LayerPlan, dense: nn.Embedding) -> LowRankEmbedding:
    new = LowRankEmbedding(
        *(layer.out_features, layer.in_features, layer.rank or 0, layer.has_bias),
        padding_idx=dense.padding_idx,
        device="meta",
        dtype=dense.weight.dtype,
    )
    new.relative_error = layer.relative_error
    return new


def _without_data(code: QuantizedWeight, old: nn.Module) -> QuantizedModule:
    """Make the module that ``code`` describes, on the meta device; a bias stays."""
    scheme = scheme_of(code)
    dtype: torch.dtype = old.weight.dtype  # type: ignore[assignment,union-attr]
    if code.is_embedding:
        padding: int | None = old.padding_idx  # type: ignore[assignment]
        return QuantizedEmbedding(
            code.rows, code.columns, scheme, padding_idx=padding, device="meta", dtype=dtype
        )
    new = _empty_linear(code, dtype, SharedQuantizedDown if isinstance(old, SharedDown) else QuantizedLinear)
    bias: nn.Parameter | None = old.bias  # type: ignore[assignment]
    new.register_parameter("bias", bias)
    return new


def _empty_linear(
    code: QuantizedWeight, dtype: torch.dtype, cls: type[QuantizedLinear] = QuantizedLinear
) -> QuantizedLinear:
    flags = {"smooth_scale": code.smooth_scale, "input_shift": code.input_shift}
    sizes, scheme = (code.columns, code.rows), scheme_of(code)
    return cls(*sizes, False, scheme, layer_type=code.layer_type, **flags, device="meta", dtype=dtype)


def check_structure(model: nn.Module, plan: Plan) -> list[LayerPlan]:
    """Return the layers that `restructure` would factorize; raises as it does, and changes nothing."""
    check_codes(model, plan, None, {}, loading=True)
    return _validate(model, plan, _blocked(model, plan), loading=True)


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
    ):  # what consists of coded parts before these
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
    """Make the dense layer or table that ``module`` stands for."""
    if isinstance(module, (LowRankLinear, QuantizedLinear)):
        return layer_type_named(module.layer_type).layer(module.dense_weight(), module.dense_bias())
    assert isinstance(module, (LowRankEmbedding, QuantizedEmbedding))
    sizes = module.num_embeddings, module.embedding_dim
    return nn.Embedding(*sizes, module.padding_idx, _weight=module.dense_weight(), _freeze=False)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place that the dotted ``name`` gives."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new


def _blocked(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Return why layers and tables must stay as they are, whatever ``plan`` says."""
    return find_all_obstacles(model, plan.owners, find_doubts(model, plan.overruled))


def _validate(
    model: nn.Module, plan: Plan, blocked: Mapping[str, str], loading: bool = False
) -> list[LayerPlan]:
    """Return the layers to factorize, or raise before anything has changed."""
    equal = plan.owners
    modules = dict(model.named_modules())
    shared = plan.shared
    todo = []
    if not loading:
        _check_heads(model, plan)
    for layer in plan:
        module = modules.get(layer.name)
        if layer.tied_to is not None:
            _check_follower(layer, plan, modules)
            if layer.name in equal and not loading:
                _check_equal(model, layer, plan, blocked)
            continue
        if layer.rank is None and not isinstance(module, _Factorized):
            continue
        if module is None:
            raise PlanError(
                f"{layer.name}: {type(model).__name__} has no such layer. The plan is for {plan.model}."
            )
        if isinstance(module, _Factorized):
            corrects = isinstance(module, LowRankLinear) and module.base is not None
            if (module.rank, corrects) != (layer.rank, layer.correction):
                found = f"{'as a correction, ' if corrects else ''}at rank {module.rank}"
                raise PlanError(
                    f"{layer.name}: factorized already, {found}; the plan says "
                    f"{'correction, ' if layer.correction else ''}{layer.rank or 'dense'}. "
                    "Call decompress(model) first, or start from the dense checkpoint."
                )
            continue
        if layer.name in blocked:
            raise PlanError(f"{layer.name}: this layer must stay dense: it {blocked[layer.name]}.")
        _check_layer(module, layer, shared=layer.shares_down_with is not None or layer.name in shared)
        if not loading:  # a checkpoint's ranks and weights are as they are
            if layer.shares_down_with is None and layer.name not in shared:
                _check_pays(layer)
            _check_weight(module, layer)
        todo.append(layer)
    for name, layers in shared.items():
        _check_shared(name, layers, modules, loading)
    return todo


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


def _check_heads(model: nn.Module, plan: Plan) -> None:
    """Check that no table is replaced without the heads that are tied to it."""
    compressed = {layer.name for layer in plan.factorized} | {code.name for code in plan.quantized}
    for head, table in tied_heads(model).items():
        if table in compressed and (head not in plan or plan[head].tied_to != table):
            raise PlanError(
                f"{table}: the plan changes this table, but not {head}, which is tied to it. Make the plan "
                f"for this model, so that {head} is the same as {table} in it."
            )


def _check_follower(layer: LayerPlan, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Check that ``layer`` can use the weight of what the plan names."""
    module, table = modules.get(layer.name), modules.get(layer.tied_to or "")
    if isinstance(module, TiedLinear):
        if module.owner is not table:
            raise PlanError(f"{layer.name}: the plan says that it uses {layer.tied_to}, but it uses another.")
        return
    owners = nn.Embedding, *_Factorized, QuantizedModule
    if table is None or not (isinstance(table, owners) or layer_type_of(table) is not None):
        raise PlanError(
            f"{layer.name}: is to use the weight of {layer.tied_to}, which is no table or linear layer here."
        )
    if module is None or (layer.rank is not None and layer.tied_to not in plan):
        raise PlanError(
            f"{layer.name}: the model or the plan lacks it, or {layer.tied_to}, which it is to use."
        )
    _check_layer(module, replace(layer, rank=None), shared=False)
    rows, columns = _sizes(table)
    if (layer.out_features, layer.in_features) != (rows, columns):
        raise PlanError(
            f"{layer.name}: is to use the weight of {layer.tied_to}, which has another shape: "
            f"{rows} rows of {columns}."
        )


def _sizes(owner: nn.Module) -> tuple[int, int]:
    """Return the shape ``(rows, columns)`` of the weight of a table or layer, whatever it is stored as."""
    if isinstance(owner, LowRankLinear):
        return owner.out_features, owner.in_features
    if isinstance(owner, LowRankEmbedding):
        return owner.num_embeddings, owner.embedding_dim
    if isinstance(owner, QuantizedModule):
        return owner.shape
    rows, columns = weight_of(owner).shape
    return rows, columns


def _check_equal(model: nn.Module, layer: LayerPlan, plan: Plan, blocked: Mapping[str, str]) -> None:
    """Check that a linear layer has the weight that it is to use of another, if that is to change."""
    owner = layer.tied_to or ""
    if layer not in plan.tied or isinstance(model.get_submodule(layer.name), TiedLinear):
        return
    if layer.name in blocked:
        raise PlanError(f"{layer.name}: cannot use the weight of {owner}: it {blocked[layer.name]}.")
    if plan[owner].tied_to is not None or not equal_layers(model, [owner, layer.name]):
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
    if rank > layer.largest_rank_that_saves:
        raise PlanError(
            f"{layer.name}: rank {rank} does not save parameters.\n"
            f"  The weight (out={layer.out_features}, in={layer.in_features}) has "
            f"{layer.dense_parameters:,} parameters; rank {rank} needs {layer.parameters_at(rank):,}.\n"
            f"  Use a rank of at most {layer.largest_rank_that_saves}, or keep this layer dense."
        )


def _check_weight(module: nn.Module, layer: LayerPlan) -> None:
    try:
        checked_weight(module.weight)  # type: ignore[arg-type]
    except WeightError as error:
        raise WeightError(f"{layer.name}: {error}") from error

"""Store weights as integers: those of dense layers, of factors and of embeddings alike.

It comes after factorizing, never before: factors of a coded weight would carry its rounding along. Inner
dimensions are free to be rotated (``LR = (LO)(OᵀR)``), so before they are coded, factors are brought to
orthonormal columns of ``L`` and then rotated at random. That spreads every outlier over all components,
and the vector between the factors, which has one scale, uses its range evenly. Source of rotating before
quantizing: QuIP (Chee et al. 2023, arXiv:2307.13304) and QuaRot (Ashkboos et al. 2024, arXiv:2404.00456);
between two factors it costs nothing at inference. Statistics, where there are any, say how to scale and
shift what a layer reads (`lowrank.nn.quantized`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.errors import LowRankError, PlanError, TargetError, WeightError
from lowrank.linalg import Scheme
from lowrank.linalg.svd import checked_weight
from lowrank.nn import Coded, LowRankLinear, QuantizedEmbedding, QuantizedLinear, kind_of
from lowrank.obstacles import check_model, embeddings, find_embedding_obstacles, find_obstacles, linear_layers
from lowrank.patterns import matches, no_match
from lowrank.planning import CodedWeight
from lowrank.statistics import Moments, Stats
from lowrank.surgery import adopt, replace_module
from lowrank.targets import check_patterns, not_wanted


def weights_to_code(
    model: nn.Module,
    scheme: Scheme,
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
    stats: Stats | None = None,
) -> list[CodedWeight]:
    """Choose what `lowrank.quantize` codes; its arguments and errors."""
    codes = [_smoothed(model, code, stats) for code in _chosen(check_model(model), scheme, targets, ignore)]
    if not codes:
        raise LowRankError(
            f"No weight of {type(model).__name__} is left to be coded as {scheme.name}: those that could be "
            "are coded already, ignored, or part of a head (name it in targets)."
        )
    for code in codes:
        try:
            scheme.check(code.rows, code.columns)
        except WeightError as error:
            raise WeightError(f"{code.name}: {error}") from error
    return codes


def encode_weights(
    model: nn.Module,
    codes: Sequence[CodedWeight],
    stats: Stats | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Carry out the ``codes`` of a plan; those that are there already count as done.

    Raises:
        PlanError: If a module is missing, of another kind or shape, or coded otherwise. Nothing has changed.
        WeightError: If a weight is not finite, or does not divide into groups.
    """
    modules = dict(model.named_modules())
    todo = []
    for code in codes:
        module = modules.get(code.name)
        if module is None:
            raise PlanError(f"{code.name}: {type(model).__name__} has no such layer, whose weight is coded.")
        if isinstance(module, Coded) and _described(code.name, module) == code:
            continue
        plain = replace(code, smooth=False, centred=False)
        if _described(code.name, module, Scheme(code.scheme, code.group_size)) != plain:
            raise PlanError(
                f"{code.name}: the plan codes a {code.kind} of shape ({code.rows}, {code.columns}) as "
                f"{code.scheme}, which does not fit this {type(module).__name__}."
            )
        try:
            Scheme(code.scheme, code.group_size).check(code.rows, code.columns)
            checked_weight(module.weight)  # type: ignore[arg-type]
        except WeightError as error:
            raise WeightError(f"{code.name}: {error}") from error
        if code.smooth and (stats is None or _reader(code.name) not in stats):
            raise PlanError(
                f"{code.name}: the plan scales this layer's inputs by their statistics: pass "
                "stats=calibrate(model, data)."
            )
        todo.append(code)
    names = {code.name for code in todo}
    for name, module in modules.items():
        if isinstance(module, LowRankLinear) and {f"{name}.down", f"{name}.up"} <= names:
            _rotate(module, seed)
    for code in tqdm(todo, desc="coding", unit="weight", disable=None if progress else True):
        old = model.get_submodule(code.name)
        replace_module(model, code.name, adopt(_coded(model, code, old, stats), old))


@torch.no_grad()
def _coded(model: nn.Module, code: CodedWeight, module: nn.Module, stats: Stats | None) -> Coded:
    scheme = Scheme(code.scheme, code.group_size)
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding.from_embedding(module, scheme)
    kind = kind_of(module)
    assert kind is not None
    weight = kind.weight(module)
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    smooth = center = seen = None
    if stats is not None and code.smooth:
        inputs = stats.inputs[stats.sources[_reader(code.name)]]
        smooth, center = _scaling(weight, inputs, code.centred)
        seen = _read(inputs, code.centred)
    elif stats is not None:
        seen = _read_between(model, code.name, stats)
    if center is not None and smooth is not None:
        mean = weight.float() @ (center.float() / smooth.float())
        parent = _parent(model, code.name)
        if code.name.endswith(".down") and isinstance(parent, LowRankLinear):
            mean, taker = parent.up.weight.float() @ mean, parent.bias  # up is still dense: it comes second
        else:
            taker = bias
        assert taker is not None  # else it would not be centred
        taker.add_(mean.to(taker.dtype))
    return QuantizedLinear.from_weight(
        weight, bias, scheme, kind=kind.name, smooth=smooth, center=center, moments=seen
    )


def _read(inputs: Moments, centred: bool) -> Tensor | None:
    """Return the second moment of a layer's input, if more than its diagonal is known."""
    second = inputs.second(centred)
    return second if second.ndim == 2 else None


def _read_between(model: nn.Module, name: str, stats: Stats) -> Tensor | None:
    """Return the second moment ``R C Rᵀ`` of what an ``up`` reads, if that is known."""
    layer = _parent(model, name)
    reader = name.removesuffix(".up")
    if not isinstance(layer, LowRankLinear) or reader not in stats:
        return None
    down = layer.down
    centred = isinstance(down, QuantizedLinear) and down.center is not None
    second = _read(stats.inputs[stats.sources[reader]], centred)
    right = down.dense_weight() if isinstance(down, Coded) else down.weight
    return None if second is None else right.double() @ second.to(right.device) @ right.double().T


def _scaling(weight: Tensor, moments: Moments, centred: bool) -> tuple[Tensor, Tensor | None]:
    """Return by what to scale the inputs, and what to take from them then.

    Half of the unevenness of the features goes into the weight, as in SmoothQuant; a feature that is
    constant stays as it is. Both are float16, so they stay well within its range.
    """
    second = moments.second(centred)
    spread = (second if second.ndim == 1 else second.diagonal()).clamp(min=0).sqrt().to(weight.device)
    largest = weight.abs().amax(0).double()
    alive = (spread > 0) & (largest > 0)
    smooth = torch.where(alive, (largest / torch.where(alive, spread, 1.0)).sqrt(), 1.0)
    if alive.any():
        smooth = torch.where(alive, smooth / smooth[alive].log().mean().exp(), smooth)
    smooth = smooth.clamp(1e-2, 1e2).to(torch.float16)
    if not centred:
        return smooth, None
    center = moments.mean.to(weight.device) * smooth.double()
    return smooth, center.clamp(-6e4, 6e4).to(torch.float16)


def _reader(name: str) -> str:
    """Return the layer, as statistics know it, whose input the coded module ``name`` reads."""
    return name.removesuffix(".down")


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _smoothed(model: nn.Module, code: CodedWeight, stats: Stats | None) -> CodedWeight:
    """Return ``code`` with inputs scaled, where they are known, and shifted, where a bias takes that up."""
    if stats is None or code.kind == "embedding" or _reader(code.name) not in stats:
        return code
    parent = _parent(model, code.name)
    has_bias = code.bias
    if code.name.endswith(".down") and isinstance(parent, LowRankLinear):
        has_bias = parent.bias is not None
    return replace(code, smooth=True, centred=has_bias and code.scheme == "int8")


def _chosen(
    model: nn.Module, scheme: Scheme, targets: Sequence[str] | None, ignore: Sequence[str] | None
) -> Iterator[CodedWeight]:
    """Choose what to code; raise if a pattern matches nothing, or names what cannot be coded."""
    if isinstance(model, (nn.Linear, nn.Embedding, LowRankLinear, Coded)) or kind_of(model) is not None:
        raise TargetError(
            f"The model is itself a {type(model).__name__}, and no module can replace itself. "
            "Pass the module that holds the layer."
        )
    modules = dict([*linear_layers(model), *embeddings(model)])
    for pattern in [*check_patterns("targets", targets), *check_patterns("ignore", ignore)]:
        if not any(matches(name, pattern) for name in modules):
            raise no_match(pattern, list(modules), f"linear layers and embeddings of {type(model).__name__}")
    blocked = find_obstacles(model) | find_embedding_obstacles(model)
    for name, module in modules.items():
        if not_wanted(name, targets, ignore or ()):
            continue
        if isinstance(module, LowRankLinear):
            yield from _factors_to_code(name, module, scheme)
        elif name not in blocked:
            yield _described(name, module, scheme)
        elif name in (targets or ()):
            raise TargetError(
                f"{name}: this weight cannot be coded: it {blocked[name]}. Take it out of targets."
            )


def _factors_to_code(name: str, layer: LowRankLinear, scheme: Scheme) -> Iterator[CodedWeight]:
    if type(layer.down) is nn.Linear and layer.owns_down:
        yield _described(f"{name}.down", layer.down, scheme)
    if type(layer.up) is nn.Linear:
        yield _described(f"{name}.up", layer.up, scheme)


def _described(name: str, module: nn.Module, scheme: Scheme | None = None) -> CodedWeight:
    """Describe a module that is coded, or what it will be under ``scheme``."""
    if isinstance(module, Coded):
        scheme = module.scheme
    assert scheme is not None
    how = scheme.name, scheme.group_size
    if isinstance(module, (nn.Embedding, QuantizedEmbedding)):
        return CodedWeight(name, "embedding", module.num_embeddings, module.embedding_dim, False, *how)
    if isinstance(module, QuantizedLinear):
        flags = module.smooth is not None, module.center is not None
        return CodedWeight(name, module.kind, *module.shape, module.bias is not None, *how, *flags)
    kind = kind_of(module)
    if kind is None:
        raise PlanError(f"{name}: a {type(module).__name__} has no weight that can be coded.")
    rows, columns = kind.weight(module).shape
    return CodedWeight(name, kind.name, rows, columns, module.bias is not None, *how)


@torch.no_grad()
def _rotate(layer: LowRankLinear, seed: int) -> None:
    """Bring ``up`` to orthonormal columns, and rotate the inner dimensions at random; the product stays."""
    left, right = layer.up.weight.double(), layer.down.weight.double()
    if layer.rank > layer.out_features:  # no orthonormal columns
        return
    basis, triangle = torch.linalg.qr(left)
    generator = torch.Generator().manual_seed(seed)
    shape = layer.rank, layer.rank
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(left.device)
    turn: Tensor = torch.linalg.qr(noise).Q
    layer.up.weight.copy_(basis @ turn)
    layer.down.weight.copy_(turn.T @ triangle @ right)

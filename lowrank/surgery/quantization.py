"""Make modules with integer weights from floating-point ones. Only factors change in place.

Inner dimensions are free to be rotated (``LR = (LO)(OᵀR)``), so before they are quantized, factors are
brought to orthonormal columns of ``L`` and then rotated at random. That spreads every outlier over all
components, and a rounding error of equal size in each does equal harm. Source of rotating before quantizing:
QuIP (Chee et al. 2023, arXiv:2307.13304) and QuaRot (Ashkboos et al. 2024, arXiv:2404.00456); between two
factors it costs nothing at inference. Statistics, where there are any, say how to scale and shift what a
layer reads (`lowrank.nn.quantized`), and how its inputs lie (`lowrank.linalg.quantize_weight`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank.calibration.moments import Moments
from lowrank.calibration.statistics import Stats
from lowrank.linalg import Gram, Metric, rotated, smooth_scale_of
from lowrank.linalg.mixed_widths import even_components
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    SharedDown,
    SharedQuantizedDown,
    layer_type_named,
    layer_type_of,
)
from lowrank.plans.layer_plan import QuantizedWeight
from lowrank.plans.stored_tensors import scheme_of


@torch.no_grad()
def quantized_module(
    model: nn.Module, stored: QuantizedWeight, stats: Stats | None
) -> tuple[QuantizedModule, Tensor | None]:
    """Return the module to put in place of ``model``'s ``stored.name``.

    Returns:
        The module, and what the layer's bias has to take up when it is put there, ``(out,)``; of a ``down``
        that is the bias of its ``up``. ``None`` if nothing.
    """
    scheme, module = scheme_of(stored), model.get_submodule(stored.name)
    if isinstance(module, nn.Embedding):
        moments = row_moments(stats, stored.name) if not scheme.storage.rounds_inputs else None
        return QuantizedEmbedding.from_embedding(module, scheme, moments), None
    layer_type = layer_type_named("linear") if isinstance(module, SharedDown) else layer_type_of(module)
    assert layer_type is not None  # checked
    weight = layer_type.weight(module)
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    parent, _, part = stored.name.rpartition(".")
    layer = model.get_submodule(parent)
    factor = part if isinstance(layer, LowRankLinear) else None
    reader = stored.name if factor is None else parent
    if stats is None or reader not in stats:
        return _like(module).from_weight(weight, bias, scheme, layer_type=layer_type.name), None
    inputs = stats.inputs[stats.sources[reader]]
    if factor == "up":
        assert isinstance(layer, LowRankLinear)
        seen = _between(layer, inputs)
        return QuantizedLinear.from_weight(
            weight, bias, scheme, layer_type=layer_type.name, moments=seen
        ), None
    if factor == "down":
        inputs = _of_all(model, layer, stats)
    smooth_scale = input_shift = mean = None
    if stored.smooth_scale:
        smooth_scale, input_shift = _scaling(weight, inputs, stored.input_shift)
    if input_shift is not None and smooth_scale is not None:
        mean = weight.float() @ (input_shift.float() / smooth_scale.float())
        if isinstance(layer, LowRankLinear):
            mean = layer.up.weight.float() @ mean  # of which there is a floating-point one still
    new = _like(module).from_weight(
        weight,
        bias,
        scheme,
        layer_type=layer_type.name,
        smooth_scale=smooth_scale,
        input_shift=input_shift,
        moments=_second(inputs, stored.input_shift, weight.device),
    )
    return new, mean


def _scaling(weight: Tensor, moments: Moments, centred: bool) -> tuple[Tensor, Tensor | None]:
    """Return by what to scale the inputs, and what to take from them then, within the range of float16."""
    smooth_scale = smooth_scale_of(weight, moments.variances(centred))
    if not centred:
        return smooth_scale, None
    input_shift = moments.mean.to(weight.device) * smooth_scale.double()
    return smooth_scale, input_shift.clamp(-6e4, 6e4).to(torch.float16)


def _second(inputs: Moments, centred: bool, device: torch.device) -> Tensor | None:
    """Return the second moment of a layer's input, if more than its diagonal is known."""
    second = inputs.second(centred)
    return second.to(device) if second.ndim == 2 else None


def _between(layer: LowRankLinear, inputs: Moments) -> Tensor | None:
    """Return the second moment ``R C Rᵀ`` of what an ``up`` reads, if that is known."""
    down: nn.Module = layer.down
    centred = isinstance(down, QuantizedLinear) and down.input_shift is not None
    right: Tensor = down.dense_weight() if isinstance(down, QuantizedModule) else down.weight  # type: ignore[assignment]
    second = _second(inputs, centred, right.device)
    return None if second is None else right.double() @ second @ right.double().T


@torch.no_grad()
def rotate(layers: Sequence[LowRankLinear | LowRankEmbedding], seed: int) -> None:
    """Mix the inner dimensions of the factors, so that integers hold them well; the products stay.

    ``layers`` have one ``down``.
    """
    down, ups = layers[0].down.weight, [layer.up.weight for layer in layers]
    right = down.T if isinstance(layers[0], LowRankEmbedding) else down  # (rank, …)
    left, mixed = rotated(torch.cat(ups), right, seed)
    for up, part in zip(ups, torch.split(left, [len(up) for up in ups]), strict=True):
        up.copy_(part)
    right.copy_(mixed)


def row_moments(stats: Stats | None, embedding: str) -> Tensor | None:
    """Return how much errors in the rows of an embedding count, ``(columns, columns)``, if that is known."""
    if stats is None or embedding not in stats.embeddings:
        return None
    inputs = stats.metric(embedding, stats.best_metric(), False).inputs
    return inputs.matrix if isinstance(inputs, Gram) else None


@torch.no_grad()
def even_out(layer: LowRankEmbedding, metric: Metric) -> None:
    """Scale the components so that an error in each counts the same under ``metric``; the product stays."""
    left, right = even_components(layer.down.weight, layer.up.weight.T, metric)
    layer.down.weight.copy_(left)
    layer.up.weight.copy_(right.T)


def readers_of(model: nn.Module, layer: LowRankLinear) -> dict[str, LowRankLinear]:
    """Return the layers that use the ``down`` of ``layer``, with their names, itself among them."""
    every = ((n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear))
    return {name: module for name, module in every if module.down is layer.down}


def _like(module: nn.Module) -> type[QuantizedLinear]:
    return SharedQuantizedDown if isinstance(module, SharedDown) else QuantizedLinear


def _of_all(model: nn.Module, layer: nn.Module, stats: Stats) -> Moments:
    """Return the moments of what all read that use the ``down`` of ``layer``; each input counts once."""
    assert isinstance(layer, LowRankLinear)
    sources = dict.fromkeys(stats.sources[n] for n in readers_of(model, layer) if n in stats)
    moments = [stats.inputs[source] for source in sources]
    return functools.reduce(operator.add, moments)

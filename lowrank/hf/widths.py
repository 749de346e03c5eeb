"""One width for all feed-forward blocks: the model's own config says it; its folder loads without lowrank."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lowrank.nn import QuantizedModule, features_before, forget_features_before, layer_type_of


def say_widths_in_config(model: PreTrainedModel) -> None:
    """Write the width of ``model``'s feed-forward blocks into its config, if a config can say it.

    It can where a model that is built from it has the very tensors of ``model``, by name and shape; which
    fields of the config mean the width is found by trying those with the old one. The layers are then
    ordinary ones of a smaller model. Where it cannot, since blocks differ or layers are factorized or
    quantized, nothing changes, and the plan in the config holds the widths.
    """
    narrow = [module for module in model.modules() if features_before(module) is not None]
    if any(isinstance(module, QuantizedModule) for module in narrow):
        return
    widths = set(itertools.chain.from_iterable(map(_widths, narrow)))
    if len(widths) != 1:
        return
    ((before, width),) = widths
    shapes = _shapes(model)
    for fields in _candidates(model.config, before):
        config = copy.deepcopy(model.config)
        for field in fields:
            setattr(config, field, width)
        if _shapes_of(type(model), config) == shapes:
            for field in fields:
                setattr(model.config, field, width)
            for module in narrow:
                forget_features_before(module)
            return


def _widths(layer: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the numbers of features before and now, on each side that has lost some."""
    layer_type, before = layer_type_of(layer), features_before(layer)
    assert layer_type is not None  # of a narrower layer
    assert before is not None
    for old, new in zip(before, layer_type.weight(layer).shape, strict=True):
        if new < old:
            yield old, new


def _candidates(config: PretrainedConfig, before: int) -> Iterator[tuple[str, ...]]:
    """Yield the fields, alone and in pairs, as of an encoder and a decoder, that may mean the width."""
    fields = [name for name, value in config.to_dict().items() if value == before and type(value) is int]
    if getattr(config, "n_inner", before) is None:  # GPT-2's, for four times the hidden size
        fields.append("n_inner")
    yield from ((field,) for field in fields)
    yield from itertools.combinations(fields, 2)


def _shapes_of(cls: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of a model of ``config``, or ``None`` where there is no such model."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return _shapes(cls(config))
    except Exception:  # a foreign class may raise anything for a size that it cannot have
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

"""What a folder must hold before transformers loads it, and a model after that.

transformers fills in or casts what does not fit, and warns at most; here that is an error. Names in a file
are not always those in the model, so transformers' own rules translate them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from lowrank.checkpoint.checkpoint import planned_tensors
from lowrank.errors import CheckpointError
from lowrank.files.folders import SHARDS, TENSORS
from lowrank.files.integrity import SEAL, check_dtype, check_is_text_table, check_seal, read_tensors, sealed
from lowrank.files.json_file import read_json
from lowrank.files.safetensors_header import Stored, read_header
from lowrank.files.state_dict import check_finite_state
from lowrank.nn import LowRankEmbedding, LowRankLinear, PivotedUp, QuantizedModule, TiedLinear
from lowrank.plans.plan import Plan

CONFIG, SECTION = "config.json", "quantization_config"

_IF_EDITED = (
    "Copy it again. If you have edited it yourself, load it once with "
    "from_pretrained(folder, quantization_config=LowRankConfig(verify=False)), and save that."
)

LAYER_COUNTS = frozenset(
    {
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
        *("num_decoder_layers", "encoder_layers", "decoder_layers"),
    }
)
"""What configs of transformers call the number of their blocks."""

MOST_LAYERS = 1000
"""Blocks that are built without a question, in seconds."""

OWN = LowRankLinear, LowRankEmbedding, TiedLinear, QuantizedModule
"""Modules that `lowrank` puts into a model."""


def with_digests(config: dict[str, Any], tensors: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of a ``config.json`` with the digests of the ``tensors`` beside it, and its own."""
    section = {**config[SECTION], "tensors": dict(tensors)}
    digest = sealed({**config, SECTION: section})[SEAL]
    return {**config, SECTION: {**section, SEAL: digest}}


def check_config(file: Path) -> None:
    """Refuse a ``config.json`` that is not as `lowrank.save` wrote it, or that names code to run.

    Raises:
        CheckpointError: If it has a digest that does not fit, or a class that is not one of transformers'.
    """
    config = read_json(file)
    section = config.get(SECTION)
    if isinstance(section, dict) and SEAL in section:
        others = {name: value for name, value in section.items() if name != SEAL}
        check_seal(file, {**config, SECTION: others, SEAL: section[SEAL]}, _IF_EDITED)
    _check_layer_counts(file, config)
    name = config.get("model_type")
    if "auto_map" in config and (not isinstance(name, str) or name not in transformers.CONFIG_MAPPING):
        raise CheckpointError(
            f"{file}: the model is defined by code in the folder, which lowrank never runs. If you trust it, "
            "load the model with transformers and trust_remote_code=True."
        )


def _check_layer_counts(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config with far more layers than its files can hold: building those would take forever."""
    counts = {name: value for name, value in config.items() if name in LAYER_COUNTS and type(value) is int}
    name = max(counts, key=lambda name: counts[name], default=None)
    if name is None or counts[name] <= MOST_LAYERS:
        return
    files = [*file.parent.glob(TENSORS), *file.parent.glob(SHARDS)]
    tensors = sum(len(read_header(one)) for one in files)
    if tensors < counts[name]:
        raise CheckpointError(
            f"{file}: {name} is {counts[name]:,}, but the files hold {tensors:,} tensors. It was changed."
        )


def compare_digests(folder: Path, headers: Mapping[str, Mapping[str, Stored]], digests: Any) -> None:
    """Refuse files in ``folder`` whose tensors are not those that `lowrank.save` wrote."""
    check_is_text_table(folder / CONFIG, digests, "tensors")
    missing = set(digests)
    for file, header in headers.items():
        for name, _ in read_tensors(file, header, digests):
            missing.discard(name)
    for name in sorted(missing):
        raise CheckpointError(f"{folder}: lacks the tensor {name}. A file is damaged or gone; copy it again.")


def check_loaded_values(model: PreTrainedModel) -> None:
    """Refuse NaN and infinity, and codes that no weight has; what is offloaded stays unread."""
    advice = (
        "Load it in the dtype in which it was saved; if that does not help, the file is damaged: copy it "
        "again."
    )
    path, state = model.config.name_or_path, model.state_dict()
    check_finite_state(model, path, advice)
    for name, module in model.named_modules():
        if isinstance(module, PivotedUp) and not module.order.is_meta:
            module.check_stored(path, name, module.order)
        if isinstance(module, QuantizedModule) and not module.scale.is_meta:
            module.check_stored(path, name, module.scheme, state)


def check_shapes(headers: Mapping[str, Mapping[str, Stored]], plan: Plan) -> None:
    """Refuse files whose tensors have other shapes than the plan says; absent names do not count.

    A sharded checkpoint has each tensor in one of its files, and some models store other names.
    """
    try:
        expected = {name: part.shape for name, part in planned_tensors(plan).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error
    replaced = {weight.name for weight in plan.quantized} | {layer.name for layer in plan.tied}
    dense = {f"{layer.name}.weight" for layer in plan if layer.rank is None and layer.name not in replaced}
    factorized = {layer.name for layer in plan if layer.rank is not None and layer.tied_to is None}
    known = expected.keys() | {f"{name}.up.bias" for name in factorized}
    for file, header in headers.items():
        for name, stored in header.items():
            if name in dense and 0 in stored.shape:  # without elements where the layer is factorized
                raise CheckpointError(
                    f"{file}: the tensor {name} belongs to a factorized layer, but by config.json the layer "
                    "is dense. One of the two files has been changed."
                )
            if name not in known and not factorized.isdisjoint(_prefixes(name)):
                raise CheckpointError(f"{file}: the tensor {name} is no part of a factorized layer.")
            wanted = expected.get(name, stored.shape)
            if stored.shape != wanted:
                raise CheckpointError(
                    f"{file}: the tensor {name} has shape {stored.shape}, but by config.json it must have "
                    f"{wanted}. One of the two files has been changed."
                )


def _prefixes(name: str) -> Iterator[str]:
    """Yield the modules in which a tensor may be: of ``a.b.weight`` ``a`` and ``a.b``."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def check_names_and_dtypes(
    headers: Mapping[str, Mapping[str, Stored]], conversions: list[WeightTransform], model: PreTrainedModel
) -> None:
    """Refuse integers where the model has floating-point numbers, and tensors that it does not know.

    A model of another class than the saved one need not know those of the head.
    """
    stored = {name: (file, tensor) for file, header in headers.items() for name, tensor in header.items()}
    expected = model.state_dict()
    strays: dict[str, str] = {}  # name in the model -> name in the file
    found: set[str] = set()
    for name, target in _targets(stored, conversions, model.base_model_prefix, expected).items():
        file, tensor = stored[name]
        if target not in expected:
            strays[target] = name
        elif _is_code(model, target) or expected[target].is_floating_point():
            check_dtype(file, name, tensor, expected[target].dtype, exact=_is_code(model, target))
        found.add(target)
    for name in sorted(name for name in expected if _is_code(model, name) and name not in found):
        raise CheckpointError(
            f"{model.config.name_or_path}: the checkpoint lacks the tensor {name}. It is damaged: "
            "copy it again."
        )
    if is_saved_class(model):
        for stray in sorted(_unexpected(model, set(strays))):
            name = strays[stray]
            raise CheckpointError(
                f"{stored[name][0]}: has the tensor {name}, which {type(model).__name__} does not know. "
                "The file has been changed; copy it again."
            )


def _is_code(model: nn.Module, name: str) -> bool:
    """Tell whether the tensor has a dtype of its own: codes, scales, the order of pivoted outputs."""
    layer, _, part = name.rpartition(".")
    module = model.get_submodule(layer)
    codes = isinstance(module, QuantizedModule) and part in QuantizedModule.BUFFER_NAMES
    return codes or (isinstance(module, PivotedUp) and part == "order")


def _targets(
    names: Iterable[str], conversions: list[WeightTransform], prefix: str, expected: dict[str, Tensor]
) -> dict[str, str]:
    """Translate names in a file into names in the model, as transformers will."""
    rules = deepcopy(conversions)  # each notes whether it was used
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    targets = {}
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, prefix, expected)
        targets[name] = name if target not in expected and name in expected else target
    return targets


def _unexpected(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Leave out the names that the model's class lets a checkpoint have in excess."""
    info = LoadStateDictInfo(set(), names, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    return info.unexpected_keys


def is_saved_class(model: PreTrainedModel) -> bool:
    """Tell whether ``model`` is of the class that was saved."""
    return type(model).__name__ in (model.config.architectures or ())


def check_complete(model: PreTrainedModel) -> None:
    """Refuse a model whose tensors were not all in the checkpoint: transformers only warns.

    A model of another class than the saved one may lack its head, but no factor.
    """
    same_class = is_saved_class(model)
    factorized = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, OWN) and not isinstance(m, TiedLinear)
    )
    for name, parameter in model.named_parameters():
        required = same_class or name.startswith(factorized)
        offloaded = parameter.is_meta  # to disk, by a device_map
        if required and not offloaded and not getattr(parameter, "_is_hf_initialized", False):
            raise CheckpointError(
                f"{model.config.name_or_path}: the checkpoint lacks the tensor {name}. It is damaged, or was "
                "not saved by lowrank. Save the model again."
            )


def check_no_lost_bias(folder: str | Path, model: nn.Module, unexpected: Iterable[str]) -> None:
    """Refuse a folder with biases that the model's class has no place for: its outputs would be others.

    Args:
        folder: Where ``model`` was loaded from.
        model: It.
        unexpected: The names of tensors in the folder that transformers has passed over.

    Raises:
        CheckpointError: If one is the bias of a layer that the class builds without.
    """
    modules = dict(model.named_modules())
    for name in sorted(unexpected):
        parent, _, leaf = name.rpartition(".")
        if leaf == "bias" and parent in modules and modules[parent]._parameters.get("bias", modules) is None:
            raise CheckpointError(
                f"{folder}: has the tensor {name}, but {type(model).__name__} builds {parent} without a "
                "bias, so its outputs would be others. decompress keeps the biases that add_bias=True has "
                "given; save the model as it is before that."
            )

"""Transformers models: what their configs record, what they save and load, where their heads begin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lowrank.adapter import inspect
from lowrank.errors import CheckpointError, LowRankError
from lowrank.files.folders import SHARDS, TENSORS
from lowrank.files.integrity import digest_of, read_tensors
from lowrank.files.json_file import read_json
from lowrank.files.readme import write_card
from lowrank.files.safetensors_header import read_header
from lowrank.files.state_dict import check_disjoint, stored_tensors
from lowrank.hf.checks import (
    CONFIG,
    check_config,
    check_no_lost_bias,
    with_digests,
)
from lowrank.hf.config import METHOD, LowRankConfig
from lowrank.hf.ties import rewrite_ties
from lowrank.hf.tokenizer import check_tokenizer as check_tokenizer
from lowrank.hf.widths import say_widths_in_config
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft, structure
from lowrank.plans.plan import Plan
from lowrank.reports.model_card import transformers_card

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""``owner/model``."""


def record(model: nn.Module, plan: Plan | None = None) -> None:
    """Write into the config of each transformers model in ``model`` what is factorized in it; fit its ties.

    ``save_pretrained`` stores the config, so that ``from_pretrained`` finds the structure again. What
    counts is the model; the ``plan`` that was carried out adds the request and the reasons.
    """
    rewrite_ties(model)
    if isinstance(model, PreTrainedModel):  # within another module, that is what is saved
        say_widths_in_config(model)
    for part in _pretrained_models(model):
        found = structure(part)
        if found.factorized or found.quantized or any(layer.is_narrower for layer in found):
            known = plan if plan is not None else recorded(part)
            if known is None or not known.explains(found):
                found = draft(inspect(part))  # which reads the model's code for the reasons
            done = known.carried_out(found) if known is not None else found
            if _method(part) == "gguf" and hasattr(part, "hf_quantizer"):
                # Unpacked, see check_unquantized: an ordinary model by now. A copy built from its config
                # has the entry only.
                part.hf_quantizer.remove_quantization_config(part)
            part.config.quantization_config = LowRankConfig(plan=done.to_dict())
        elif _method(part) == METHOD:
            del part.config.quantization_config


def check_unquantized(model: nn.Module) -> None:
    """Refuse a model that another method has quantized; its checkpoint could not say both.

    A GGUF file whose weights were unpacked on loading, as they are on a CPU, is an ordinary model.

    Raises:
        LowRankError: If a config in ``model`` names another method.
    """
    for part in _pretrained_models(model):
        method = _method(part)
        unpacked = method == "gguf" and all(p.is_floating_point() for p in part.parameters())
        if method not in (None, METHOD) and not unpacked:
            raise LowRankError(
                f"{type(part).__name__} is quantized already ({method}). "
                "Load the unquantized checkpoint and compress that."
            )


def recorded(model: nn.Module) -> Plan | None:
    """Return the plan that the model's config holds."""
    if not isinstance(model, PreTrainedModel):
        return None
    config = getattr(model.config, "quantization_config", None)
    return Plan.from_dict(config.plan) if isinstance(config, LowRankConfig) and config.plan else None


def _method(model: PreTrainedModel) -> str | None:
    """Name the quantization method that the model's config records."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(method, "value", method)


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether ``model`` is a transformers model."""
    return isinstance(model, PreTrainedModel)


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of ``model``, under the names that ``save_pretrained`` uses."""
    tensors, _ = stored_tensors(model)
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    return revert_weight_conversion(model, kept)


def _pretrained_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the transformers models in ``model``: the whole, and the parts that have their own config."""
    seen: set[int] = set()
    for module in model.modules():  # outermost first
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield module


def head_layers(seen: Inspection) -> dict[str, str]:
    """Return ``{layer name: head}`` for the linear layers outside the base model of a model with a head."""
    model = seen.model
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return {}
    base = f"{model.base_model_prefix}."
    return {name: name.split(".")[0] for name in seen.linear if not name.startswith(base)}


def parts(model: nn.Module) -> list[str]:
    """Name the transformers models inside ``model`` that have their own config, and may be saved alone."""
    names = {id(module): name for name, module in model.named_modules()}
    return [name for name in (names[id(part)] for part in _pretrained_models(model)) if name]


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write ``model`` by its own ``save_pretrained``, with digests and a card if it is compressed.

    A later ``save_pretrained`` into the folder writes tensors and config anew, without digests: they are
    never out of date.

    Raises:
        CheckpointError: If a tensor has no data, unless transformers keeps it on a disk (``device_map``),
            or if two tensors share a part of their memory.
    """
    if getattr(model, "hf_device_map", None) is None:
        check_disjoint(stored_tensors(model)[0])
    record(model)
    model.save_pretrained(folder)
    plan = recorded(model)
    if plan is not None:
        files = (*folder.glob(TENSORS), *sorted(folder.glob(SHARDS)))
        tensors = {
            name: digest_of(tensor)
            for file in files
            for name, tensor in read_tensors(file, read_header(file))
        }
        config = with_digests(read_json(folder / CONFIG), tensors)
        text = json.dumps(config, indent=2) + "\n"  # in the order of transformers
        (folder / CONFIG).write_text(text, encoding="utf-8")
        write_card(folder, transformers_card(model, plan.budget, _base_model(model)))


def _base_model(model: PreTrainedModel) -> str | None:
    """Return the hub's name of what ``model`` was made from; a path of the machine at hand is none."""
    name = model.config.name_or_path
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def load(folder: str | Path) -> PreTrainedModel:
    """Load a transformers folder, or a name on the hub, as the class that was saved.

    Raises:
        CheckpointError: If a file is damaged, the config names no class of transformers, or the folder has
            digests and something is not as it was saved.
    """
    if Path(folder).is_dir():
        check_config(Path(folder) / CONFIG)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        name = (config.architectures or ["none"])[0]
        cls = getattr(transformers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            raise CheckpointError(f"{folder}/{CONFIG}: architecture {name!r} is not one of transformers'.")
        model, found = cls.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)  # type: ignore[attr-defined]
        check_no_lost_bias(folder, model, found["unexpected_keys"])
        return model
    except (LowRankError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any class: transformers uses the fields of the config unchecked
        raise CheckpointError(
            f"{folder}: transformers cannot load it: {type(error).__name__}: {error}"
        ) from error

"""The transformers plug-in: with the command line and the demo, the only package that imports transformers.

It teaches ``from_pretrained`` two things: a folder whose config says ``"quant_method": "lowrank"``
is loaded into factorized layers, without the dense weights ever existing; and
``from_pretrained(dense, quantization_config=LowRankConfig(rank=100))`` compresses after loading.
Importing this file registers both; `lowrank` imports it as soon as transformers' models are loaded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.cards import HOW_TO_LOAD
from lowrank.checkpoint import checked, digest_of, plan_shapes
from lowrank.coding import PARTS
from lowrank.errors import BudgetError, CheckpointError, LowRankError, PlanError
from lowrank.folders import TENSORS
from lowrank.hf.cards import refresh_card
from lowrank.hf.ties import rewrite_ties, with_tied_heads
from lowrank.hf.tokenizer import check_tokenizer as check_tokenizer
from lowrank.nn import Coded, LowRankEmbedding, LowRankLinear, TiedLinear
from lowrank.pipeline import compress
from lowrank.planning import Budget, Plan
from lowrank.surgery import restructure
from lowrank.targets import draft
from lowrank.tensorfile import DTYPE_NAMES, Stored, read_header, stored_tensors

METHOD = "lowrank"

_OWN = LowRankLinear, LowRankEmbedding, TiedLinear, Coded
"""Modules that `lowrank` puts into a model."""


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What to do with a dense checkpoint, or what was done to a compressed one.

    Args:
        rank, keep, energy, error, max_bytes: The budget, exactly one of them, as in `lowrank.compress`.
        targets, ignore, allocation, round_to, tolerance, seed: As in `lowrank.compress`.
        quantize, group_size, residual, slow: As in `lowrank.compress`.
        share, share_size: As in `lowrank.compress`; ``share="inputs"`` needs data.
        overrule: As in `lowrank.compress`, for subclasses of `torch.nn.Linear`: others need inputs.
        plan: The plan that was carried out, as `Plan.to_dict` gives it; then no budget is needed.
        tensors: The digests that `lowrank.save` leaves in ``config.json`` for `lowrank.load`. Not kept: the
            config of a model in memory must not vouch for tensors that may change.
        how_to_load: A sentence in ``config.json`` for people whose program does not know the method.

    Raises:
        LowRankError: If the budget is malformed, or the plan is damaged or from a newer version.

    Example:
        >>> LowRankConfig(rank=100).budget.value
        100
    """

    def __init__(
        self,
        rank: int | Mapping[str, int] | None = None,
        keep: float | None = None,
        energy: float | None = None,
        error: float | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        allocation: str = "global",
        round_to: int = 8,
        tolerance: float = 1e-3,
        seed: int = 0,
        plan: dict[str, Any] | None = None,
        quant_method: str = METHOD,
        tensors: Mapping[str, str] | None = None,
        max_bytes: int | None = None,
        quantize: str | None = None,
        group_size: int | None = None,
        residual: bool = False,
        slow: str = "warn",
        share: str | None = None,
        share_size: int | None = None,
        how_to_load: str | None = None,
        overrule: Sequence[str] | None = None,
    ) -> None:
        self.quant_method = quant_method
        self.plan = plan
        if plan is not None:
            if any(value is not None for value in (rank, keep, energy, error, max_bytes)):
                raise BudgetError(
                    "LowRankConfig: give either a plan that was carried out or a budget, not both."
                )
            Plan.from_dict(plan)  # a damaged or newer plan is refused here
            self.how_to_load = HOW_TO_LOAD
            return
        Budget.of(rank=rank, keep=keep, energy=energy, error=error, max_bytes=max_bytes)
        self.rank, self.keep, self.energy, self.error, self.max_bytes = rank, keep, energy, error, max_bytes
        self.targets, self.ignore, self.overrule = targets, ignore, overrule
        self.allocation, self.round_to = allocation, round_to
        self.tolerance, self.seed = tolerance, seed
        self.quantize, self.group_size, self.residual, self.slow = quantize, group_size, residual, slow
        self.share, self.share_size = share, share_size

    @property
    def budget(self) -> Budget:
        """The budget of a config that asks for compression."""
        given = {kind: getattr(self, kind) for kind in ("rank", "keep", "energy", "error", "max_bytes")}
        return Budget.of(**given)

    def request(self) -> dict[str, Any]:
        """Return the keyword arguments for `lowrank.compress`."""
        return {k: v for k, v in vars(self).items() if k not in ("quant_method", "plan")}

    def get_loading_attributes(self) -> dict[str, Any]:
        """Refuse to be passed for a folder that is factorized: transformers asks this in no other case."""
        raise LowRankError(
            "from_pretrained(quantization_config=LowRankConfig(...)): this checkpoint is factorized already, "
            "and keeps its ranks. Load it without quantization_config, or compress the dense checkpoint."
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the config from ``config.json``; raises `CheckpointError` for an unknown field."""
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise CheckpointError(f"config.json: the lowrank section is not understood: {error}.") from error
        except LowRankError as error:
            raise CheckpointError(f"config.json: {error}") from error


# Where a folder is quantized already, transformers only warns about the config that was passed, unless
# the class is in this table; then it asks the config for the attributes that still count. There is no
# function to register for that.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, LowRankConfig)


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Carries a `LowRankConfig` through ``from_pretrained``; the model keeps nothing of it."""

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        plan = Plan.from_dict(self.quantization_config.plan)
        self._headers = {file: read_header(file) for file in checkpoint_files or ()}
        for file, header in self._headers.items():
            _check_shapes(file, {name: stored.shape for name, stored in header.items()}, plan)
        self._plan = with_tied_heads(model, _localized(plan, model))
        try:
            restructure(model, self._plan)
        except PlanError as error:
            raise CheckpointError(f"config.json does not fit the architecture: {error}") from error
        rewrite_ties(model)
        for module in model.modules():
            if isinstance(module, _OWN):  # some models initialise whatever is called Linear
                module._is_hf_initialized = True  # type: ignore[assignment]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Check the files against the model: only here transformers tells which names it will translate."""
        if self.pre_quantized:
            _check_tensors(self._headers, weight_conversions, model)
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Factors are ordinary parameters: .half(), Trainer and save_pretrained must not see a
        # quantized model. The config alone remembers.
        self.remove_quantization_config(model)
        if self.pre_quantized:
            _check_loaded(model)
            _check_finite(model)
            record(model, self._plan)
        else:
            compress(model, **self.quantization_config.request())

    def is_serializable(self) -> bool:
        """Say that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the factors can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works."""
        return True


def record(model: nn.Module, plan: Plan | None = None) -> None:
    """Write into the config of each transformers model in ``model`` what is factorized in it; fit its ties.

    ``save_pretrained`` stores the config, so that ``from_pretrained`` finds the structure again. What
    counts is the model; the ``plan`` that was carried out adds the request and the reasons.
    """
    rewrite_ties(model)
    for part in _pretrained_models(model):
        found = draft(part)
        if found.factorized or found.codes:
            known = plan if plan is not None else recorded(part)
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


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of ``model``, under the names that ``save_pretrained`` uses."""
    tensors, _ = stored_tensors(model)
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    return revert_weight_conversion(model, kept)


def _check_shapes(file: str, shapes: Mapping[str, tuple[int, ...]], plan: Plan) -> None:
    """Refuse a file whose tensors have other shapes than the plan says; absent names do not count.

    A sharded checkpoint has each tensor in one of its files, and some models store other names.
    """
    expected = plan_shapes(plan)
    coded, tied = {code.name for code in plan.codes}, {layer.name for layer in plan.tied}
    for layer in plan:
        marker = f"{layer.name}.weight"  # without elements where the layer is factorized
        if layer.rank is None and layer.name not in coded | tied and 0 in shapes.get(marker, ()):
            raise CheckpointError(
                f"{file}: the tensor {marker} belongs to a factorized layer, but by config.json the layer "
                "is dense. One of the two files has been changed."
            )
        if layer.rank is None or layer.same_as is not None:
            continue
        known = {*expected, f"{layer.name}.up.bias"}
        strange = next((n for n in shapes if n.startswith(f"{layer.name}.") and n not in known), None)
        if strange is not None:
            raise CheckpointError(f"{file}: the tensor {strange} is no part of a factorized layer.")
    for name, shape in expected.items():
        if shapes.get(name, shape) != shape:
            raise CheckpointError(
                f"{file}: the tensor {name} has shape {shapes[name]}, but by config.json it must have "
                f"{shape}. One of the two files has been changed."
            )


def _check_tensors(
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
        elif expected[target].is_floating_point() and not tensor.is_floating_point:
            raise CheckpointError(
                f"{file}: the tensor {name} is stored as {tensor.dtype}, but the model needs "
                "floating-point numbers there. The file has been changed; copy it again."
            )
        elif _is_code(model, target) and tensor.dtype != DTYPE_NAMES[expected[target].dtype]:
            raise CheckpointError(
                f"{file}: the tensor {name} is stored as {tensor.dtype}, but codes and scales must be "
                f"{DTYPE_NAMES[expected[target].dtype]}. The file has been changed; copy it again."
            )
        found.add(target)
    for name in sorted(name for name in expected if _is_code(model, name) and name not in found):
        raise CheckpointError(
            f"{model.config.name_or_path}: the checkpoint lacks the tensor {name}. It is damaged: "
            "copy it again."
        )
    if _is_saved_class(model):
        for stray in sorted(_unexpected(model, set(strays))):
            name = strays[stray]
            raise CheckpointError(
                f"{stored[name][0]}: has the tensor {name}, which {type(model).__name__} does not know. "
                "The file has been changed; copy it again."
            )


def _is_code(model: nn.Module, name: str) -> bool:
    """Tell whether the tensor is the codes or the scales of a coded weight."""
    layer, _, part = name.rpartition(".")
    return part in ("codes", "scale", "smooth", "center") and isinstance(model.get_submodule(layer), Coded)


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


def _is_saved_class(model: PreTrainedModel) -> bool:
    """Tell whether ``model`` is of the class that was saved."""
    return type(model).__name__ in (model.config.architectures or ())


def _pretrained_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the transformers models in ``model``: the whole, and the parts that have their own config."""
    seen: set[int] = set()
    for module in model.modules():  # outermost first
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield module


def _localized(plan: Plan, model: PreTrainedModel) -> Plan:
    """Translate layer names between a base model and the same model with a head.

    Layers that the model does not have, those of a head, are left out.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = model.base_model_prefix + "."

    def translated(name: str | None) -> str | None:
        candidates = () if name is None else (name, prefix + name, name.removeprefix(prefix))
        return next((name for name in candidates if name in names), None)

    layers = []
    for layer in plan:
        name = translated(layer.name)
        if name is not None:
            owner, table = translated(layer.down_of), translated(layer.same_as) or layer.same_as
            layers.append(replace(layer, name=name, down_of=owner, same_as=table))
    codes = []
    for code in plan.codes:
        parent, _, part = code.name.rpartition(".")
        factor = part in PARTS and parent in plan
        name = translated(parent if factor else code.name)
        if name is not None:
            codes.append(replace(code, name=f"{name}.{part}" if factor else name))
    if plan.factorized and not any(layer.rank for layer in layers):
        raise CheckpointError(
            f"config.json: none of the {len(plan.factorized)} factorized layers of {plan.model} "
            f"(such as {plan.factorized[0].name}) is in {type(model).__name__}."
        )
    return replace(plan, layers=tuple(layers), codes=tuple(codes))


def _check_loaded(model: PreTrainedModel) -> None:
    """Refuse a model whose tensors were not all in the checkpoint: transformers only warns.

    A model of another class than the saved one may lack its head, but no factor.
    """
    same_class = _is_saved_class(model)
    factorized = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, _OWN) and not isinstance(m, TiedLinear)
    )
    for name, parameter in model.named_parameters():
        required = same_class or name.startswith(factorized)
        offloaded = parameter.is_meta  # to disk, by a device_map
        if required and not offloaded and not getattr(parameter, "_is_hf_initialized", False):
            raise CheckpointError(
                f"{model.config.name_or_path}: the checkpoint lacks the tensor {name}. It is damaged, or was "
                "not saved by lowrank. Save the model again."
            )


def _check_finite(model: PreTrainedModel) -> None:
    """Refuse factors with NaN or infinity, and codes that no weight has; what is offloaded stays unread."""
    for layer, module in model.named_modules():
        own: dict[str, Tensor] = {}
        if isinstance(module, (LowRankLinear, LowRankEmbedding)):
            own = dict(module.named_parameters())
        elif isinstance(module, Coded):
            own = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
        for name, factor in own.items():
            if not factor.is_meta and not torch.isfinite(factor).all():
                raise CheckpointError(
                    f"{model.config.name_or_path}: the tensor {layer}.{name} has NaN or infinite elements in "
                    f"{factor.dtype}. Load it in the dtype in which it was saved; if that does not help, the "
                    "file is damaged: copy it again."
                )
        if isinstance(module, Coded) and not module.scale.is_meta:
            _check_codes(model, layer, module)


def _check_codes(model: PreTrainedModel, layer: str, module: Coded) -> None:
    """Refuse values that coding does not give: they show that codes and scales are not of one weight."""
    state, int8 = module.state_dict(), module.scheme.name == "int8"
    wrong = {
        "scale": int8 and not bool((state["scale"] > 0).all()),
        "codes": int8 and bool((state["codes"] == -128).any()),
        "smooth": "smooth" in state and not bool((state["smooth"] > 0).all()),
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise CheckpointError(
            f"{model.config.name_or_path}: the tensor {layer}.{name} has values that no coded weight has. "
            "The file is damaged: copy it again."
        )


def head_layers(model: nn.Module) -> dict[str, str]:
    """Return ``{layer name: head}`` for the linear layers outside the base model of a model with a head."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return {}
    base = f"{model.base_model_prefix}."
    names = (layer.name for layer in draft(model))
    return {name: name.split(".")[0] for name in names if not name.startswith(base)}


def parts(model: nn.Module) -> list[str]:
    """Name the transformers models inside ``model`` that have their own config, and may be saved alone."""
    names = {id(module): name for name, module in model.named_modules()}
    return [name for name in (names[id(part)] for part in _pretrained_models(model)) if name]


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether ``model`` is a transformers model."""
    return isinstance(model, PreTrainedModel)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write ``model`` by its own ``save_pretrained``, its config up to date, and digests into the config.

    A later ``save_pretrained`` into the folder writes tensors and config anew, without digests: they are
    never out of date.
    """
    record(model)
    model.save_pretrained(folder)
    if _method(model) == METHOD:
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        tensors = {name: digest_of(tensor) for _, name, tensor in _tensors(folder)}
        config["quantization_config"]["tensors"] = tensors
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_card(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    """Let ``save_pretrained`` write the model card of a compressed model, too."""

    @functools.wraps(save_pretrained)
    def saved(
        self: PreTrainedModel,
        save_directory: str | Path,
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if self.should_save_on_this_rank(is_main_process) and not adapters_only:
            refresh_card(self, Path(save_directory), recorded(self))

    return saved


# transformers has no function to register for what is written beside a model; all its models save by this.
PreTrainedModel.save_pretrained = _with_card(PreTrainedModel.save_pretrained)


def load(folder: str | Path) -> PreTrainedModel:
    """Load a transformers folder, or a name on the hub, as the class that was saved.

    Raises:
        CheckpointError: If the config names no class of transformers, or the folder has digests and a
            tensor is not the one that was saved.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise CheckpointError(f"{folder}/config.json: architecture {name!r} is not one of transformers'.")
    section = getattr(config, "quantization_config", None)
    if isinstance(section, dict) and section.get("tensors") is not None:
        _check_digests(Path(folder), section["tensors"])
    return cls.from_pretrained(folder)  # type: ignore[attr-defined]


def _check_digests(folder: Path, digests: Any) -> None:
    """Refuse tensors that `save` did not write; a folder without digests is not checked."""
    config = folder / "config.json"
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise CheckpointError(f'{config}: "tensors" must map names to strings.')
    missing = set(digests)
    for file, name, tensor in _tensors(folder):
        if name not in digests:
            raise CheckpointError(f"{file}: has the tensor {name}, which {config} does not list.")
        checked(file, name, tensor, digests[name])
        missing.discard(name)
    for name in sorted(missing):
        raise CheckpointError(f"{folder}: lacks the tensor {name}. A file is damaged or gone; copy it again.")


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield file, name and tensor for all that ``save_pretrained`` has written, one at a time."""
    for file in (*folder.glob(TENSORS), *sorted(folder.glob("model-*.safetensors"))):
        names = sorted(read_header(file))
        try:
            with safe_open(file, framework="pt") as stored:
                for name in names:
                    yield file, name, stored.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}.") from error

"""The transformers plug-in: with the command line and the demo, the only package that imports transformers.

It teaches ``from_pretrained`` two things: a folder whose config says ``"quant_method": "lowrank"``
is loaded into factorized layers, without the dense weights ever existing; and
``from_pretrained(dense, quantization_config=LowRankConfig(rank=100))`` compresses after loading.
Importing this file registers both; `lowrank` imports it as soon as transformers' models are loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform, revert_weight_conversion
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.arguments import flag
from lowrank.errors import BudgetError, CheckpointError, LowRankError, PlanError
from lowrank.files.folders import TENSORS
from lowrank.files.integrity import align, digest_of, read_tensors
from lowrank.files.json_file import read_json
from lowrank.files.readme import write_card
from lowrank.files.safetensors_header import Stored, check_disjoint, read_header, stored_tensors
from lowrank.hf.checks import (
    CONFIG,
    OWN,
    SECTION,
    check_complete,
    check_config,
    check_names_and_dtypes,
    check_no_lost_bias,
    check_shapes,
    check_values,
    compare_digests,
    with_digests,
)
from lowrank.hf.ties import rewrite_ties, with_tied_heads
from lowrank.hf.tokenizer import check_tokenizer as check_tokenizer
from lowrank.inspection.eligibility import linear_layers
from lowrank.inspection.targets import draft
from lowrank.pipeline.verbs import compress
from lowrank.plans.plan import Budget, Plan
from lowrank.reports.model_card import HOW_TO_LOAD, transformers_card
from lowrank.surgery.quantization import PARTS
from lowrank.surgery.replacement import restructure

METHOD = "lowrank"

LARGEST_TO_ALIGN = 2**20
"""Bytes. transformers maps files into memory: to copy larger tensors would double what loading needs."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""``owner/model``."""


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What to do with a dense checkpoint, or what was done to a compressed one.

    Args:
        rank, keep, energy, error, max_bytes: The budget, exactly one of them, as in `lowrank.compress`.
        targets, ignore, allocation, round_to, tolerance, seed: As in `lowrank.compress`.
        quantize, group_size, correction, on_missing_kernel: As in `lowrank.compress`.
        share, share_size: As in `lowrank.compress`; ``share="inputs"`` needs data.
        overrule: As in `lowrank.compress`, for subclasses of `torch.nn.Linear`: others need inputs.
        plan: The plan that was carried out, as `Plan.to_dict` gives it; then no budget is needed.
        tensors, digest: What `lowrank.save` leaves in ``config.json``: digests of the tensors, and of the
            config. No model in memory has them: its config must not vouch for tensors that may change.
        how_to_load: A sentence in ``config.json`` for people whose program does not know the method.
        verify: For a folder that is compressed already, in place of a budget: whether the digests are
            compared (as they are by default).

    Raises:
        LowRankError: If the budget is malformed, or the plan is damaged or from a newer version.

    Example:
        >>> LowRankConfig(rank=100).budget.value
        100
    """

    # Of the class, so that a config that is written has those only which were given.
    plan: dict[str, Any] | None = None
    verify: bool | None = None
    tensors: Mapping[str, str] | None = None
    digest: str | None = None

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
        correction: bool = False,
        on_missing_kernel: str = "warn",
        share: str | None = None,
        share_size: int | None = None,
        how_to_load: str | None = None,
        overrule: Sequence[str] | None = None,
        digest: str | None = None,
        verify: bool | None = None,
    ) -> None:
        self.quant_method = quant_method
        self.plan = plan
        budgets = (rank, keep, energy, error, max_bytes)
        given = [*(budget is not None for budget in budgets), plan is not None, verify is not None]
        if sum(given[-2:]) and sum(given) > 1:
            raise BudgetError(
                "LowRankConfig: give a budget, a plan that was carried out, or verify, not two."
            )
        if plan is not None:
            Plan.from_dict(plan)  # a damaged or newer plan is refused here
            self.how_to_load = HOW_TO_LOAD
            if tensors is not None or digest is not None:
                self.tensors, self.digest = tensors, digest
            return
        if verify is not None:
            self.verify = flag("verify", verify)
            return
        Budget.of(rank=rank, keep=keep, energy=energy, error=error, max_bytes=max_bytes)
        self.rank, self.keep, self.energy, self.error, self.max_bytes = rank, keep, energy, error, max_bytes
        self.targets, self.ignore, self.overrule = targets, ignore, overrule
        self.allocation, self.round_to = allocation, round_to
        self.tolerance, self.seed = tolerance, seed
        self.quantize, self.group_size, self.correction, self.on_missing_kernel = (
            quantize,
            group_size,
            correction,
            on_missing_kernel,
        )
        self.share, self.share_size = share, share_size

    @property
    def budget(self) -> Budget:
        """The budget of a config that asks for compression."""
        given = {kind: vars(self).get(kind) for kind in ("rank", "keep", "energy", "error", "max_bytes")}
        return Budget.of(**given)

    def request(self) -> dict[str, Any]:
        """Return the keyword arguments for `lowrank.compress`."""
        return {k: v for k, v in vars(self).items() if k not in ("quant_method", "plan")}

    def carried_out(self) -> Plan:
        """Return the plan of a folder that is compressed already; raises `CheckpointError` without one."""
        if self.plan is None:
            raise CheckpointError(
                f"{CONFIG}: its {SECTION} has no plan, so what the tensors mean is not known. Copy it again."
            )
        return Plan.from_dict(self.plan)

    def check(self, headers: Mapping[str, Mapping[str, Stored]]) -> None:
        """Compare a folder's tensors, of which ``headers`` tell by file, with the digests, if there are some.

        Raises:
            CheckpointError: If a tensor, or the config beside them, is not as it was saved.
        """
        folder = Path(next(iter(headers))).parent
        if (folder / CONFIG).exists():  # the tensors of one folder may be loaded with the config of another
            check_config(folder / CONFIG)
        if self.tensors is not None or self.digest is not None:
            compare_digests(folder, headers, self.tensors)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return ``verify``, for a folder that is factorized: transformers asks this in no other case.

        Raises:
            LowRankError: If something else is asked of such a folder.
        """
        if self.verify is None:
            raise LowRankError(
                "from_pretrained(quantization_config=LowRankConfig(...)): this checkpoint is factorized "
                "already, and keeps its ranks. Load it without quantization_config, or compress the dense "
                "checkpoint."
            )
        return {"verify": self.verify}

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
        config, files = self.quantization_config, checkpoint_files or []
        if not self.pre_quantized:
            config.budget  # noqa: B018 - raises where there is none
            return
        plan = config.carried_out()
        self._headers = {file: read_header(file) for file in files}
        if files and config.verify is not False:
            config.check(self._headers)
        check_shapes(self._headers, plan)
        self._plan = with_tied_heads(model, _localized(plan, model))
        try:
            restructure(model, self._plan)
        except PlanError as error:
            raise CheckpointError(f"config.json does not fit the architecture: {error}") from error
        rewrite_ties(model)
        for module in model.modules():
            if isinstance(module, OWN):  # some models initialise whatever is called Linear
                module._is_hf_initialized = True  # type: ignore[assignment]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Check the files against the model: only here transformers tells which names it will translate."""
        if self.pre_quantized:
            check_names_and_dtypes(self._headers, weight_conversions, model)
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Factors are ordinary parameters: .half(), Trainer and save_pretrained must not see a
        # quantized model. The config alone remembers.
        self.remove_quantization_config(model)
        if self.pre_quantized:
            check_complete(model)
            check_values(model)
            tensors = (*model.parameters(), *model.buffers())
            align(tensor for tensor in tensors if tensor.nbytes <= LARGEST_TO_ALIGN)
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
        if found.factorized or found.quantized:
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
            owner, table = translated(layer.shares_down_with), translated(layer.tied_to) or layer.tied_to
            layers.append(replace(layer, name=name, shares_down_with=owner, tied_to=table))
    quantized = []
    for code in plan.quantized:
        parent, _, part = code.name.rpartition(".")
        factor = part in PARTS and parent in plan
        name = translated(parent if factor else code.name)
        if name is not None:
            quantized.append(replace(code, name=f"{name}.{part}" if factor else name))
    if plan.factorized and not any(layer.rank for layer in layers):
        raise CheckpointError(
            f"config.json: none of the {len(plan.factorized)} factorized layers of {plan.model} "
            f"(such as {plan.factorized[0].name}) is in {type(model).__name__}."
        )
    return replace(plan, layers=tuple(layers), quantized=tuple(quantized))


def head_layers(model: nn.Module) -> dict[str, str]:
    """Return ``{layer name: head}`` for the linear layers outside the base model of a model with a head."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return {}
    base = f"{model.base_model_prefix}."
    names = (name for name, _ in linear_layers(model))
    return {name: name.split(".")[0] for name in names if not name.startswith(base)}


def parts(model: nn.Module) -> list[str]:
    """Name the transformers models inside ``model`` that have their own config, and may be saved alone."""
    names = {id(module): name for name, module in model.named_modules()}
    return [name for name in (names[id(part)] for part in _pretrained_models(model)) if name]


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether ``model`` is a transformers model."""
    return isinstance(model, PreTrainedModel)


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
        files = (*folder.glob(TENSORS), *sorted(folder.glob("model-*.safetensors")))
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

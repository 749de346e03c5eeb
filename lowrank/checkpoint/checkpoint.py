"""Save and load: safetensors for the tensors, JSON for the structure, never pickle.

A folder is written as one step (see `lowrank.files.folders`), so that an interrupt leaves the old one
whole. Transformers models become ordinary ``save_pretrained`` folders; for any
other module the folder holds ``model.safetensors`` and ``lowrank.json``:

    {"format": 3, "plan": {...}, "tensors": {name: sha256}, "aliases": {name: name}, "digest": sha256}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank._transformers import load_plugin
from lowrank.adapter import adapter
from lowrank.arguments import accepts, flag, path
from lowrank.errors import CheckpointError, LowRankError, PlanError, SchemeError
from lowrank.files.folders import STRUCTURE, TENSORS, settle, staged
from lowrank.files.integrity import (
    check_dtype,
    check_finite,
    check_is_text_table,
    check_seal,
    digest_of,
    read_document,
    read_tensors,
    sealed,
)
from lowrank.files.readme import write_card
from lowrank.files.safetensors_header import METADATA, Stored, read_header
from lowrank.files.state_dict import check_disjoint, check_finite_state, state_of, stored_tensors
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.layers import check_model, check_not_compiled
from lowrank.inspection.targets import draft
from lowrank.nn import PivotedUp, QuantizedModule
from lowrank.plans.plan import Plan
from lowrank.plans.stored_tensors import TensorPart, scheme_of, tensors_of
from lowrank.reports.model_card import module_card
from lowrank.surgery.neurons import empty_layers
from lowrank.surgery.replacement import restructure
from lowrank.surgery.validation import check_structure

FORMAT = 3
"""Version of ``lowrank.json``, the only one that is read."""


@accepts(folder=path(CheckpointError), overwrite=flag)
def save(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write ``model`` to ``folder`` so that `load` gives it back bit for bit.

    Args:
        model: A compressed (or dense) module. A transformers model is written by its own
            ``save_pretrained``, for ``from_pretrained``.
        folder: A new or empty folder; its parents are made. It gets a model card, too (``README.md``).
        overwrite: Replace the checkpoint in a folder that has files; other files stay, also a README
            of yours. However the call ends, the next one that saves or loads there finds the old
            checkpoint whole, or the new one.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder is not empty, has no name of its own (such as "."), cannot be written
            or is being written by another process; or if the model holds state that is no tensor, a parameter
            that is NaN or infinite, or two that share memory without being one.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> from tempfile import mkdtemp
        >>> path = save(model, mkdtemp())
        >>> sorted(file.name for file in path.iterdir())
        ['README.md', 'lowrank.json', 'model.safetensors']
    """
    check_not_compiled(check_model(model))
    with staged(Path(folder), overwrite) as staging:
        write(model, staging)
    return Path(folder)


def write(model: nn.Module, folder: Path) -> None:
    """Write the files of a checkpoint into ``folder``, which `lowrank.files.folders.staged` gives."""
    check_finite_state(model)
    if adapter().saves(model):
        adapter().save(model, folder)
    else:
        _write(model, folder)


@accepts(folder=path(CheckpointError))
def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save` wrote.

    Args:
        folder: The folder.
        model: The dense architecture, freshly built, for a folder that is not a transformers one;
            best under ``with torch.device("meta")``, so that no dense weight is ever allocated. Its
            linear layers are replaced and its tensors loaded, in place. Tensors go to the devices of
            the model's, and from the meta device to the CPU.

    Returns:
        The model, with the dtypes of the checkpoint.

    Raises:
        CheckpointError: If a file is missing, damaged, tampered with or newer, if a tensor is missing,
            extra or of another shape, or the architecture is another. The model is then as before.
    """
    folder = Path(folder)
    settle(folder)
    if os.path.isfile(folder / STRUCTURE):  # also of a name that is too long
        if model is None:
            raise CheckpointError(
                f"{folder}: holds tensors, not code. Build the dense architecture and pass it: "
                "load(folder, model=MyModel())."
            )
        return _read(folder, check_model(model))
    if os.path.isfile(folder / "config.json"):
        if model is not None:
            raise CheckpointError(f"{folder}: a transformers folder. Call load(folder) without a model.")
        return load_plugin().load(folder)  # type: ignore[no-any-return]
    raise CheckpointError(f"{folder}: no {STRUCTURE} and no config.json here. Is this the right folder?")


def planned_tensors(plan: Plan) -> dict[str, TensorPart]:
    """Return what a checkpoint holds of compressed layers, biases left out.

    Raises:
        CheckpointError: If a weight is quantized in an unknown way.
    """
    try:
        return tensors_of(plan)
    except SchemeError as error:
        raise CheckpointError(f"the plan quantizes a weight in an unknown way: {error}") from error


def _write(model: nn.Module, folder: Path) -> None:
    tensors, aliases = stored_tensors(model)
    check_disjoint(tensors)
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    separate = {name: t.clone() if _is_view(t) else t for name, t in ready.items()}
    save_file(separate, folder / TENSORS, metadata=METADATA)
    structure = {
        "format": FORMAT,
        "plan": draft(Inspection(model)).to_dict(),
        "tensors": {name: digest_of(tensor) for name, tensor in ready.items()},
        "aliases": aliases,
    }
    text = json.dumps(sealed(structure), indent=1, allow_nan=False)
    (folder / STRUCTURE).write_text(text, encoding="utf-8")
    write_card(folder, module_card(model))


def _is_view(tensor: Tensor) -> bool:
    """Tell whether the tensor is part of a larger storage, which safetensors would refuse."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _read(folder: Path, model: nn.Module) -> nn.Module:
    structure, file = folder / STRUCTURE, folder / TENSORS
    data = read_document(structure, FORMAT)
    digests, aliases, plan = _structure_of(structure, data)
    try:
        check_structure(model, plan)
    except (PlanError, SchemeError) as error:
        raise CheckpointError(f"{structure}: does not fit the architecture: {error}") from error
    _check_aliases(structure, model, digests, aliases)
    header = read_header(file)
    _check_names(file, set(header), set(digests))
    _check_architecture(file, model, plan, {name: stored.shape for name, stored in header.items()}, aliases)
    _check_dtypes(file, model, plan, header)
    check_seal(structure, data)  # only now: the checks before this one say what is wrong
    tensors = dict(read_tensors(file, header, digests))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        check_finite(file, name, tensor, buffer=name in buffers)
    for layer in plan.factorized:
        if layer.pivoted:
            PivotedUp.check_stored(file, f"{layer.name}.up", tensors[f"{layer.name}.up.order"])
    for weight in plan.quantized:
        QuantizedModule.check_stored(file, weight.name, scheme_of(weight), tensors)
    restructure(model, plan)
    _assign(model, tensors, aliases)
    adapter().record(model)  # a transformers model inside can be saved on its own
    return model


def _structure_of(file: Path, data: dict[str, Any]) -> tuple[dict[str, str], dict[str, str], Plan]:
    """Return digests, aliases and plan of the ``data`` in ``file``."""
    if "tensors" not in data:
        raise CheckpointError(f'{file}: has no "tensors", the digests of what is stored. Copy it again.')
    check_is_text_table(file, data.get("aliases"), "aliases")
    try:
        return data["tensors"], data["aliases"], Plan.from_dict(data.get("plan"))
    except LowRankError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_aliases(
    file: Path, model: nn.Module, digests: Mapping[str, str], aliases: Mapping[str, str]
) -> None:
    """Refuse aliases of nothing, of each other, or between a parameter and a buffer."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for alias, name in aliases.items():
        if alias in digests or name not in digests or (alias in buffers) != (name in buffers):
            raise CheckpointError(f"{file}: the tensor {alias} cannot share the data of {name}.")


def _check_names(file: Path, got: set[str], expected: set[str]) -> None:
    for name in sorted(expected - got):
        raise CheckpointError(f"{file}: lacks the tensor {name}. The file is damaged; copy it again.")
    for name in sorted(got - expected):
        raise CheckpointError(f"{file}: has the tensor {name}, which {STRUCTURE} does not list.")


def _check_architecture(
    file: Path,
    model: nn.Module,
    plan: Plan,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
) -> None:
    stored = state_of(model)
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in stored:
            raise CheckpointError(
                f"{name}: this buffer is never saved, and on the meta device it has no data. "
                "Build the model on a real device."
            )
    expected = _expected_shapes(model, plan)
    got = {**shapes, **{alias: shapes.get(name, ()) for alias, name in aliases.items()}}
    for name in sorted(expected.keys() ^ got.keys()):
        where = "the checkpoint" if name in got else type(model).__name__
        other = type(model).__name__ if name in got else "the checkpoint"
        raise CheckpointError(f"{file}: the tensor {name} is in {where}, but not in {other}.")
    for name, shape in expected.items():
        if got[name] != shape:
            raise CheckpointError(
                f"{file}: the tensor {name} has shape {got[name]}; the model needs {shape}."
            )


def _check_dtypes(file: Path, model: nn.Module, plan: Plan, header: Mapping[str, Stored]) -> None:
    """Refuse integers in place of floating-point numbers, and other dtypes than a scheme's."""
    state, planned = state_of(model), planned_tensors(plan)
    for name, stored in header.items():
        exact = planned[name].dtype if name in planned else None
        other = state[name].dtype if name in state else torch.float32
        check_dtype(file, name, stored, exact or other, exact is not None)


def _expected_shapes(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the state dict's shapes as they will be once ``model`` has the structure of ``plan``."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
    shapes |= {
        f"{name}.{part}": tuple(parameter.shape)
        for name, layer in empty_layers(model, plan)
        for part, parameter in layer.named_parameters()
    }
    for layer in plan.factorized:
        if f"{layer.name}.up.weight" in shapes:
            continue  # factorized already
        if f"{layer.name}.bias" in shapes:
            shapes[f"{layer.name}.up.bias"] = shapes.pop(f"{layer.name}.bias")
        elif layer.added_bias:
            shapes[f"{layer.name}.up.bias"] = (layer.bias_features,)
    return shapes | {name: part.shape for name, part in planned_tensors(plan).items()}


def _assign(model: nn.Module, tensors: dict[str, Tensor], aliases: Mapping[str, str]) -> None:
    devices = {name: tensor.device for name, tensor in model.state_dict().items()}
    cpu = torch.device("cpu")
    placed = {
        name: tensor.to(cpu if devices[name].type == "meta" else devices[name])
        for name, tensor in tensors.items()
    }
    complete = {**placed, **{alias: placed[name] for alias, name in aliases.items()}}
    model.load_state_dict(complete, assign=True)
    for alias, name in aliases.items():  # assigning has made them separate parameters
        parent, _, child = alias.rpartition(".")
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), child, getattr(model.get_submodule(owner), key))

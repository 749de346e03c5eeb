"""What a call must leave as it was: all that can be seen of a module, of random generators, and of files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.nn import QuantizedModule

State = dict[str, Any]

HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
PLAIN = (bool, int, float, str, tuple, type(None))


def state_of(model: nn.Module) -> State:
    """Return all that can be seen of ``model``, by a name for each thing.

    Buffers of quantized layers are those of the state dict: a call may bring them into an order of the
    kernel's.
    """
    state: State = {}
    coded: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}: module"] = (type(module).__name__, module)
        state[f"{name}: training"] = module.training
        own = vars(module)
        for hooks in HOOKS:
            if isinstance(own[hooks], dict) and own[hooks]:
                known = {key: getattr(hook, "hook", hook) for key, hook in own[hooks].items()}
                state[f"{name}: {hooks}"] = tuple(known.items())
        state[f"{name}: attributes"] = {
            key: value for key, value in own.items() if isinstance(value, PLAIN) and not key.startswith("_")
        } | ({"forward": own["forward"]} if "forward" in own else {})
        if isinstance(module, QuantizedModule):
            coded |= {
                f"{name}.{key}": value for key, value in module.state_dict().items() if value is not None
            }
        else:
            for key, buffer in module._buffers.items():
                state[f"{name}: buffer {key}"] = (id(buffer), content(buffer))
        state[f"{name}: not saved"] = frozenset(module._non_persistent_buffers_set)
        for key, parameter in module._parameters.items():
            state[f"{name}: parameter {key}"] = (id(parameter), content(parameter))
            if parameter is not None:
                state[f"{name}: gradients of {key}"] = (parameter.requires_grad, content(parameter.grad))
    state |= {f"{key}: codes": content(value) for key, value in coded.items()}
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):  # transformers notes the architecture and the dtype when it saves
        state["config"] = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "dtype")}
    return state


def content(tensor: Tensor | None) -> Any:
    """Return dtype, shape and bytes of a tensor."""
    if tensor is None:
        return None
    if nn.parameter.is_lazy(tensor):
        return "without a shape"
    about = str(tensor.dtype), tuple(tensor.shape), str(tensor.device)
    if tensor.is_meta:
        return about
    plain = tensor.detach()
    return *about, plain.stride(), plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def data_of(value: Any) -> Any:
    """Return dataclasses, mappings and tensors as data that can be compared."""
    if isinstance(value, Tensor):
        return content(value)
    if is_dataclass(value) and not isinstance(value, type):
        fields = value.__dataclass_fields__  # not `asdict`, which copies tensors
        return {name: data_of(getattr(value, name)) for name in fields}
    if isinstance(value, dict):
        return {key: data_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(data_of(item) for item in value)
    return value


def globals_of() -> State:
    """Return the state of random generators, and of PyTorch's settings."""
    numbers = np.random.get_state()  # noqa: NPY002
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "Python's random state": random.getstate(),
        "numpy's random state": (numbers[0], numbers[1].tobytes(), *numbers[2:]),  # type: ignore[index]
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "mkldnn": torch.backends.mkldnn.enabled,
        "precision of products": torch.get_float32_matmul_precision(),
        "hooks of all modules": tuple(len(hooks) for hooks in _global_hooks()),
    }


def _global_hooks() -> Iterator[dict[int, Any]]:
    from torch.nn.modules import module

    yield from (
        value
        for name, value in vars(module).items()
        if name.startswith("_global") and isinstance(value, dict)
    )


def files_of(folder: Path) -> State:
    """Return the contents of all files below ``folder``, hidden ones too."""
    return {
        f"file {path.relative_to(folder)}": path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def difference(before: State, after: State) -> str | None:
    """Name the first thing that differs, with both sides; ``None`` if nothing does."""
    for name in dict.fromkeys([*before, *after]):
        one, other = before.get(name, "absent"), after.get(name, "absent")
        if one != other:
            return f"{name}: {_short(one)} before, {_short(other)} after"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:150]} … {text[-40:]}"

"""What a layer that takes the place of another takes over from it."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.module import _WrappedHook

from lowrank.errors import LowRankError
from lowrank.nn import QuantizedModule, SharedDown, SharedQuantizedDown, TiedLinear, take_features_before

_Module = TypeVar("_Module", bound=nn.Module)

HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
"""Where PyTorch keeps a module's hooks: around forward and backward, and around its state dict."""


def adopt(new: _Module, old: nn.Module) -> _Module:
    """Carry over what is known of the old layer: mode, frozen weights, hooks, sizes, readers of a factor."""
    take_features_before(new, old)
    if isinstance(new, SharedQuantizedDown) and isinstance(old, (SharedDown, SharedQuantizedDown)):
        new.expect(old.readers)
    trainable = _is_trainable(old)
    if isinstance(new, (QuantizedModule, TiedLinear)):
        new.trainable = trainable
    had_bias = any(name.endswith("bias") for name, _ in old.named_parameters())
    for name, parameter in new.named_parameters():
        if name.endswith("weight") or not had_bias:
            parameter.requires_grad_(trainable)
    for hooks in HOOKS:
        vars(new)[hooks] = vars(old)[hooks]  # the same dict, so that the user's handles remove them
    loading: dict[int, Any] = new._load_state_dict_pre_hooks
    for key, hook in loading.items():
        if isinstance(hook, _WrappedHook) and hook.with_module:  # knows the module that it is called with
            loading[key] = _WrappedHook(hook.hook, new)
    return new.train(old.training)


def _is_trainable(module: nn.Module) -> bool:
    """Tell whether every weight of ``module`` has gradients, or had some before it was quantized."""
    flags = [p.requires_grad for name, p in module.named_parameters() if name.endswith("weight")]
    flags += [part.trainable for part in module.modules() if isinstance(part, (QuantizedModule, TiedLinear))]
    return all(flags)


def check_no_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks on a factor: the dense layer has no place for them.

    Raises:
        LowRankError: If ``module``, a factorized layer or embedding called ``name``, has some.
    """
    for part, factor in module.named_modules():
        if factor is not module and any(vars(factor)[hooks] for hooks in HOOKS):
            raise LowRankError(
                f"{name}.{part}: has hooks, and decompress makes one dense layer of both factors. "
                f"Remove them first, or register them on {name}, which keeps its hooks."
            )

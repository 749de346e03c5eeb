"""`SharedDown`, `SharedQuantizedDown`: one ``down`` for layers that read the same input, computed once per
pass.

The layers call it one after another with the same tensor. The first call computes, the others get its
result, and the last one lets go of it. A result serves only while nothing has changed: input and
weight are the same tensors at the same version, in the same thread and the same mode of autograd and
autocast. Anything else computes anew, so sharing can only save time. Tensors of ``inference_mode`` do
not count their changes: there nothing is kept. Nor do those of `torch.compile`; but its graph is made
once, and has the product once where the layers read what they read when calibrated: the same, unchanged.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.linalg import linear
from lowrank.linalg.matmul import is_compiled
from lowrank.nn.quantized_linear import QuantizedLinear


class _Result(NamedTuple):
    """What one layer has computed, for the others."""

    input: weakref.ref[Tensor]
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    output: Tensor
    used_up: list[bool]  # not empty once a backward pass has freed the graph
    readers: int  # how many are still expected


class _Results(threading.local):
    """The results of this thread, by module; outside of the modules, so that these copy and pickle."""

    def __init__(self) -> None:
        self.by_module: weakref.WeakKeyDictionary[nn.Module, _Result] = weakref.WeakKeyDictionary()


results = _Results()


class _Shared(nn.Module):
    """A module that several layers call with one input.

    Attributes:
        readers: How many layers do so, its owner included. Where each reads an input of its own, it is 1, and
            nothing is kept.
        kept: While `torch.compile` makes a graph: input, mode, product, and how many are still expected.
    """

    readers: int = 1
    kept: tuple[Tensor, tuple[object, ...], Tensor, int] | None = None

    def expect(self, readers: int) -> None:
        """Say how many layers call it with the same input."""
        self.readers = readers
        self.kept = None  # there from the start, so that no graph is made anew


class SharedDown(nn.Linear, _Shared):
    """Compute ``R x`` for several `LowRankLinear` layers; in all other respects a `torch.nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, rank)``."""
        if _is_exported(input):
            return super().forward(input)
        return _computed_once(self, self.weight, input, lambda: linear(input, self.weight))


class SharedQuantizedDown(QuantizedLinear, _Shared):
    """Compute ``R x`` for several layers, as `SharedDown` does, with ``R`` as integers."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, rank)``."""
        given = self.codes if self.latent is None else self.latent
        if _is_exported(input):
            return super().forward(input)
        return _computed_once(self, given, input, lambda: super(SharedQuantizedDown, self).forward(input))


def _is_exported(input: Tensor) -> bool:
    return isinstance(input, torch.fx.Proxy) or (torch.compiler.is_compiling() and not is_compiled())


def _computed_once(module: _Shared, weight: Tensor, input: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Return what ``module`` makes of ``input``, computed or kept from another of its readers."""
    if module.readers < 2:
        return compute()
    if is_compiled():  # which finds equal products by itself where it makes derivatives
        return compute() if torch.is_grad_enabled() else _once_in_graph(module, input, compute)
    if input.is_inference() or weight.is_inference():
        return compute()
    kept = results.by_module.pop(module, None)
    state = _state(weight, input)
    if kept is not None and _serves(kept, weight, input, state):
        if kept.readers > 1:
            results.by_module[module] = kept._replace(readers=kept.readers - 1)
        return kept.output
    output = compute()
    used_up: list[bool] = []
    if output.requires_grad:
        output.register_hook(lambda _: used_up.append(True))  # type: ignore[no-untyped-call]
    known = weakref.ref(input), weakref.ref(weight), state
    results.by_module[module] = _Result(*known, output, used_up, module.readers - 1)
    return output


def _once_in_graph(module: _Shared, input: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Compute once while `torch.compile` makes a graph.

    A graph can tell tensors apart, but neither count nor hold weakly.
    """
    mode = _mode(input)
    if module.kept is not None and module.kept[0] is input and module.kept[1] == mode:
        _, _, output, expected = module.kept
        module.kept = (input, mode, output, expected - 1) if expected > 1 else None
        return output
    output = compute()
    module.kept = (input, mode, output, module.readers - 1)
    return output


def _serves(kept: _Result, weight: Tensor, input: Tensor, state: tuple[object, ...]) -> bool:
    same = kept.input() is input and kept.weight() is weight and kept.state == state
    return same and not kept.used_up


def _state(weight: Tensor, input: Tensor) -> tuple[object, ...]:
    """Return what the result depends on, beside the identity of input and weight."""
    return input._version, weight._version, *_mode(input)


def _mode(input: Tensor) -> tuple[object, ...]:
    device = input.device.type
    if not torch.amp.is_autocast_available(device):  # such as meta
        return (torch.is_grad_enabled(),)
    return torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

"""`SharedDown`, `SharedCodes`: one ``down`` for layers that read the same input, computed once per pass.

The layers call it one after another with the same tensor. The first call computes, the others get its
result, and the last one lets go of it. A result serves only while nothing has changed: input and
weight are the same tensors at the same version, in the same thread and the same mode of autograd and
autocast. Anything else computes anew, so sharing can only save time. Tensors of ``inference_mode`` do
not count their changes, and compilers find equal products by themselves: there nothing is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.linalg import linear
from lowrank.linalg.products import compiled
from lowrank.nn.quantized import QuantizedLinear


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


_results = _Results()


class SharedDown(nn.Linear):
    """Compute ``R x`` for several `LowRankLinear` layers; in all other respects a `torch.nn.Linear`.

    Attributes:
        readers: How many layers call it with the same input, its owner included. Where each reads an input
            of its own, it is 1, and nothing is kept.
    """

    readers: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, rank)``."""
        if _is_traced(input):
            return linear(input, self.weight) if compiled() else super().forward(input)
        return _computed_once(self, self.readers, self.weight, input, lambda: linear(input, self.weight))


class SharedCodes(QuantizedLinear):
    """The same with ``R`` as integers."""

    readers: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, rank)``."""
        given = self.codes if self.latent is None else self.latent
        if _is_traced(input):
            return super().forward(input)
        return _computed_once(
            self, self.readers, given, input, lambda: super(SharedCodes, self).forward(input)
        )


def _is_traced(input: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(input, torch.fx.Proxy)


def _computed_once(
    module: nn.Module, readers: int, weight: Tensor, input: Tensor, compute: Callable[[], Tensor]
) -> Tensor:
    """Return what ``module`` makes of ``input``, computed or kept from another of its ``readers``."""
    if readers < 2 or input.is_inference() or weight.is_inference():
        return compute()
    kept = _results.by_module.pop(module, None)
    state = _state(weight, input)
    if kept is not None and _serves(kept, weight, input, state):
        if kept.readers > 1:
            _results.by_module[module] = kept._replace(readers=kept.readers - 1)
        return kept.output
    output = compute()
    used_up: list[bool] = []
    if output.requires_grad:
        output.register_hook(lambda _: used_up.append(True))  # type: ignore[no-untyped-call]
    known = weakref.ref(input), weakref.ref(weight), state
    _results.by_module[module] = _Result(*known, output, used_up, readers - 1)
    return output


def _serves(kept: _Result, weight: Tensor, input: Tensor, state: tuple[object, ...]) -> bool:
    same = kept.input() is input and kept.weight() is weight and kept.state == state
    return same and not kept.used_up


def _state(weight: Tensor, input: Tensor) -> tuple[object, ...]:
    """Return what the result depends on, beside the identity of input and weight."""
    device = input.device.type
    return (
        input._version,
        weight._version,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
    )

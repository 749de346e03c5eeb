"""What the layers of a block read and return, and what their outputs are added to, seen while it runs.

A block writes into the residual stream by adding a layer's output to another tensor. That happens
between modules, where hooks see nothing; but every addition of tensors passes through PyTorch's
``__torch_function__``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowrank.inspection.blocks import Reached
from lowrank.inspection.contexts import hooked


class ResidualAddRecorder(TorchFunctionMode):
    """Notes, while a block runs, what its layers read and return, and what their outputs are added to.

    Args:
        block: The block.
        names: Layers to listen to.
        sums: Those of them whose outputs will be added to something.
        to_the_end: Whether to go on when all of that is known.

    Attributes:
        inputs, outputs: What each layer read and returned, the last time.
        addends: What was added to a layer's output, the first time, with the shape of that sum.
        repeated: Layers that ran several times.
        adds: Whether any two tensors of one shape were added.
    """

    def __init__(
        self, block: nn.Module, names: Sequence[str], sums: Collection[str] = (), to_the_end: bool = False
    ) -> None:
        super().__init__()
        self._block, self._names, self._sums, self._to_the_end = block, names, sums, to_the_end
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.addends: dict[str, Tensor] = {}
        self.repeated: set[str] = set()
        self.adds = False

    def run(self, call: Callable[[], Any]) -> None:
        """Run the block, or as much of it as is needed."""
        layers = {name: self._block.get_submodule(name) for name in self._names}
        handles = (
            layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in layers.items()
        )
        with contextlib.suppress(Reached), hooked(handles), self:
            call()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if name in self.inputs:
                self.repeated.add(name)
            self.inputs[name], self.outputs[name] = args[0] if args else kwargs["input"], output
            self._end_if_complete()

        return hook

    def _end_if_complete(self) -> None:
        complete = self.outputs.keys() >= set(self._names) and self.addends.keys() >= set(self._sums)
        if complete and not self._to_the_end:
            raise Reached

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            self._note(*args)
            self._note(*args[::-1])
        return func(*args, **(kwargs or {}))

    def _note(self, first: Any, other: Any) -> None:
        """Keep ``other`` if ``first`` is what a layer returned, perhaps after a dropout or a reshape."""
        if not (isinstance(first, Tensor) and isinstance(other, Tensor) and first.shape == other.shape):
            return
        self.adds = True
        for name, output in self.outputs.items():
            if output.data_ptr() == first.data_ptr() and output.numel() == first.numel():
                addend = other.clone()  # which may be changed in place
                self.addends.setdefault(name, addend.reshape(output.shape))
                self._end_if_complete()


_ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})

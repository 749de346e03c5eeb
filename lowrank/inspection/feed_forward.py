"""Find feed-forward blocks in what a model computes: hidden features that one linear layer reads alone.

A block is a linear layer, the reader, and one or more others, the writers, whose outputs meet nothing but
elementwise functions, and each other, before the reader multiplies them. Then feature ``i`` of a writer is
feature ``i`` of the reader's input, and both can lose it. Names tell nothing of that: every operation of one
forward pass is followed, from the writers' outputs on, and whatever is not known to be elementwise ends a
block, with its name in the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from lowrank.inspection.contexts import evaluating, hooked
from lowrank.inspection.inspection import Inspection

_SAME_ELEMENTS = frozenset(
    {
        "_prelu_kernel",
        "_to_copy",
        "alias",
        "clone",
        "contiguous",
        "detach",
        "dropout",
        "gelu_",
        "hardswish",
        "hardswish_",
        "lift_fresh",
        "log_sigmoid_forward",
        "native_dropout",
    }
)
"""Operations of ATen that are elementwise without its tag ``pointwise``."""

_VIEWS = frozenset(
    {"_unsafe_view", "expand", "flatten", "permute", "reshape", "squeeze", "transpose", "unsqueeze", "view"}
)
"""Operations that may move features: those that leave the last dimension, and its stride of 1, as it was do
not."""


@dataclass(frozen=True)
class FeedForward:
    """Layers with hidden features of their own.

    Args:
        reader: The name of the layer that reads them.
        writers: The names of the layers that make them, in the model's order.
    """

    reader: str
    writers: tuple[str, ...]


def feed_forward_blocks(
    seen: Inspection, run: Callable[[], object], ineligible: Mapping[str, str]
) -> tuple[list[FeedForward], dict[str, str]]:
    """Find the feed-forward blocks of a model in one forward pass.

    Args:
        seen: The model.
        run: Calls it on data, and returns its outputs, of which none may be hidden features.
        ineligible: ``{layer name: reason}`` of layers that must stay as they are.

    Returns:
        The blocks, by reader in the model's order, and ``{layer name: reason}`` of all linear layers in none.
        A reason reads on from "it …". Of two blocks that have a layer in common, the first one counts.
    """
    follower = _Follower({id(layer): name for name, layer in seen.linear.items()})
    with evaluating(seen.model), hooked(_hooks(seen.linear, follower)), follower:
        outputs = run()
    follower.leave(outputs)
    blocks: list[FeedForward] = []
    reasons: dict[str, str] = (
        dict.fromkeys(seen.linear, "is in no feed-forward block") | follower.ends | dict(ineligible)
    )
    for reader in seen.linear:
        writers = follower.written.get(reader, frozenset())
        if not writers:
            continue
        members = (*(name for name in seen.linear if name in writers), reader)
        reason = _reason(members, follower, blocks, ineligible)
        if reason is None:
            blocks.append(FeedForward(reader, members[:-1]))
        else:
            reasons |= dict.fromkeys(members, reason) | dict(ineligible)
    for block in blocks:
        for name in (*block.writers, block.reader):
            reasons.pop(name, None)
    return blocks, reasons


def _reason(
    members: tuple[str, ...], follower: _Follower, blocks: list[FeedForward], ineligible: Mapping[str, str]
) -> str | None:
    """Return why the layers are no block, or ``None``; the last one is the reader."""
    reader = members[-1]
    stays = next((name for name in members if name in ineligible), None)
    if stays is not None:
        return f"is in a feed-forward block with {stays}, which stays as it is ({ineligible[stays]})"
    if reader in follower.mixed:
        return f"is in a feed-forward block with {reader}, which reads other features, too"
    for name in members[:-1]:
        if name in follower.ends:
            return follower.ends[name]
        if follower.readers[name] != {reader}:
            return f"writes what several layers read: {', '.join(sorted(follower.readers[name]))}"
    taken = {name for block in blocks for name in (*block.writers, block.reader)}
    common = next((name for name in members if name in taken), None)
    return None if common is None else f"is beside {common}, which is in another feed-forward block"


def _hooks(layers: Mapping[str, nn.Module], follower: _Follower) -> Iterator[RemovableHandle]:
    for layer in layers.values():
        yield layer.register_forward_pre_hook(follower.enter, with_kwargs=True)
        yield layer.register_forward_hook(follower.exit)


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows at every moment which tensors hold the hidden features of which writers.

    Args:
        names: The names of all linear layers, by ``id``.

    Attributes:
        written: By reader, the writers of what it reads.
        readers: By writer, the layers that read what it writes.
        mixed: Readers that were called on something else than one group's hidden features.
        ends: By writer, what its features met that is not elementwise.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._held: Any = WeakIdKeyDictionary()  # tensor -> the names of its writers
        self._inside = 0
        self.written: dict[str, frozenset[str]] = {}
        self.readers: dict[str, set[str]] = {}
        self.mixed: set[str] = set()
        self.ends: dict[str, str] = {}

    def enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A layer is about to read something: what happens inside of it is known."""
        self._inside += 1
        name = self._names[id(layer)]
        read = args[0] if args else next(iter(kwargs.values()), None)
        writers = self._held.get(read, frozenset()) if isinstance(read, Tensor) else frozenset()
        if self.written.setdefault(name, writers) != writers:
            self.mixed.add(name)
            self.written[name] |= writers
        for writer in writers:
            self.readers.setdefault(writer, set()).add(name)

    def exit(self, layer: nn.Module, args: Any, output: Any) -> None:
        """A layer has written something."""
        self._inside -= 1
        if isinstance(output, Tensor):
            self._held[output] = frozenset({self._names[id(layer)]})

    def leave(self, outputs: object) -> None:
        """The model returns its outputs."""
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._end(self._held.get(leaf, ()), "is among the model's outputs")

    def _end(self, writers: Any, reason: str) -> None:
        for writer in writers:
            self.ends.setdefault(writer, reason)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and see whether it hands hidden features on."""
        result = func(*args, **(kwargs or {}))
        if self._inside:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = [tensor for tensor in tensors if tensor in self._held]
        if held:
            writers = frozenset[str]().union(*(self._held[tensor] for tensor in held))
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            reason = _ends_by(func, tensors, held, made)
            if reason is None:
                for tensor in made:
                    self._held[tensor] = writers
            else:
                self._end(writers, reason)
        return result


def _ends_by(func: Any, tensors: list[Tensor], held: list[Tensor], made: list[Tensor]) -> str | None:
    """Return how feature ``i`` of what is ``made`` comes from more than feature ``i`` of what was ``held``.

    ``None`` says that it does not. A reason reads on from "it …".
    """
    name, features = func._schema.name.removeprefix("aten::"), held[0].shape[-1]
    same = all(tensor.ndim > 0 and tensor.shape[-1] == features for tensor in (*held, *made))
    if name in _VIEWS and same and made[0].stride()[-1] == held[0].stride()[-1]:
        return None
    if torch.Tag.pointwise not in func.tags and name not in _SAME_ELEMENTS:
        return f"writes what meets {func}, which is not known to be elementwise"
    others = [tensor for tensor in tensors if not any(tensor is one for one in held)]
    alike = all(tensor.ndim == 0 or tensor.shape[-1] == 1 for tensor in others)
    if not same or not alike or (func._schema.is_mutable and not any(made[0] is one for one in held)):
        return f"writes what meets other features in {func}"
    return None

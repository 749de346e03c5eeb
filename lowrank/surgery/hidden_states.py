"""Two streams of hidden states through a stack of blocks: of the dense model and of the compressed one.

Every block is called as the model calls it (with masks, positions, an encoder's outputs), one block at a
time for all batches, so that no more than two hidden states of each batch are kept.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.data import Batch
from lowrank.errors import DataError, LowRankError
from lowrank.files.atomic_file import refusals
from lowrank.inspection.blocks import Reached, hidden_state
from lowrank.inspection.contexts import hooked

_ONCE = "once each, in the order in which they are stored. Leave it out."

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class CachedHiddenStates:
    """One batch on its way through the blocks, in both models.

    Args:
        batch: The batch.
        offload_folder: A folder for the hidden states; ``None`` keeps them in memory.

    Attributes:
        dense, small: Hidden states before the next block.
    """

    def __init__(self, batch: Batch, offload_folder: Path | None) -> None:
        self.batch = batch
        self._offload_folder = offload_folder
        self._there: list[_Call] = []  # what the dense model calls each block with, beside the hidden states
        self._here: list[_Call] = []  # the same of the compressed model

    def enter(self, model: nn.Module, blocks: Sequence[nn.Module], to_the_end: bool = False) -> None:
        """Run the dense model up to the last block, or to the end, and keep what the blocks are called with.

        Raises:
            LowRankError: If the blocks are not called once each, in order, with what the last one returned.
            DataError: If the model refuses the batch, or the hidden states are not finite.
        """
        hidden, self._there = self._calls(model, blocks, to_the_end)
        if not bool(hidden.isfinite().all()):
            raise DataError(f"Batch {self.batch.index}: what enters the first block is not finite.")
        self._device, self._here = hidden.device, self._there
        self.start(hidden)

    def enter_compressed(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Run the model up to the first block again, when all outside of the blocks is compressed."""
        hidden, self._here = self._calls(model, blocks)
        self.small = self._kept(hidden, "small")

    def _calls(
        self, model: nn.Module, blocks: Sequence[nn.Module], to_the_end: bool = False
    ) -> tuple[Tensor, list[_Call]]:
        """Return the hidden states before the first block, and the other arguments of each."""
        calls: list[_Call] = []
        entered: list[Tensor] = []
        returned: list[Tensor] = []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = _hidden_of(args, kwargs)
            if len(calls) >= len(blocks) or block is not blocks[len(calls)]:
                raise LowRankError(f"sequential=True needs blocks that are called {_ONCE}")
            if returned and not torch.equal(hidden, returned.pop()):
                raise LowRankError(
                    "sequential=True needs blocks that read what the block before has returned; before block "
                    f"{len(calls)} the model does something else with it. Leave it out."
                )
            if not calls:
                entered.append(hidden.clone())  # which a block may change in place
            calls.append((args, kwargs))
            if block is blocks[-1] and not to_the_end:
                raise Reached

        def after(_: nn.Module, args: Any, output: Any) -> None:
            returned[:] = [_output_of(output)]

        entering = (block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks)
        leaving = (block.register_forward_hook(after) for block in blocks)
        with contextlib.suppress(Reached), hooked(itertools.chain(entering, leaving)):
            self.batch.call(model)
        if len(calls) != len(blocks):
            raise LowRankError(f"sequential=True needs blocks that are called {_ONCE}")
        return entered[0], [(_plain(args[1:]), _plain(kwargs)) for args, kwargs in calls]

    def call_dense(self, block: nn.Module, number: int) -> Any:
        """Call the dense form of a block on the dense stream, as the model does."""
        return self._call(block, self.dense, self._there[number])

    def call_small(self, block: nn.Module, number: int) -> Any:
        """Call the compressed block on the compressed stream."""
        return self._call(block, self.small, self._here[number])

    def advance(self, dense: nn.Module, small: nn.Module, number: int) -> None:
        """Go through one block."""
        self.dense = self._kept(_output_of(self.call_dense(dense, number)), "dense")
        self.small = self._kept(_output_of(self.call_small(small, number)), "small")

    def start(self, hidden: Tensor) -> None:
        """Let both streams begin with the hidden states before the first block."""
        self.dense, self.small = self._kept(hidden, "dense"), self._kept(hidden, "small")

    def _kept(self, hidden: Tensor, stream: str) -> Tensor:
        """Return ``hidden``, on the disk if that is wanted; what was there before is overwritten."""
        if self._offload_folder is None:
            return hidden
        file = self._offload_folder / f"{stream}-{self.batch.index}"
        with refusals(
            self._offload_folder
        ):  # written here: a full disk kills a process that writes to mapped memory
            file.write_bytes(hidden.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        there = torch.from_file(str(file), shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return there.view(hidden.shape)

    def _call(self, block: nn.Module, hidden: Tensor, others: _Call) -> Any:
        args, kwargs = others
        hidden = hidden.to(self._device, copy=True)  # a block may change it in place
        if "hidden_states" in kwargs:
            return block(*args, **{**kwargs, "hidden_states": hidden})
        return block(hidden, *args, **kwargs)


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise LowRankError(
            "sequential=True needs blocks whose first argument is a tensor of hidden states; "
            "these get them otherwise. Leave it out."
        )
    return hidden


def _output_of(output: Any) -> Tensor:
    hidden = hidden_state(output)
    if hidden is None:
        raise LowRankError(
            f"sequential=True needs blocks that return hidden states, not {type(output).__name__}. "
            "Leave it out."
        )
    return hidden


def _plain(value: Any) -> Any:
    """Leave out caches of keys and values, told by what they can do: they would remember the last call."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_plain(item) for item in value)
    return None if hasattr(value, "get_seq_length") else value

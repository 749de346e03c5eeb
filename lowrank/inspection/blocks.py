"""Find the stack of repeated blocks in a model: what a deep network is made of, whatever its names.

The stack is the container of at least two modules of one class that holds the most
parameters: the encoder layers of BERT, the decoder layers of Llama, the residual blocks of a plain
`torch.nn.Sequential`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import LowRankError
from lowrank.inspection.contexts import hooked


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks in their order, by name; empty if nothing in ``model`` is repeated."""
    best: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            blocks = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
            alike = len({type(block) for block in blocks.values()}) == 1
            if alike and _size(blocks) > _size(best):
                best = blocks
    return best


def _size(blocks: Mapping[str, nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())


def hidden_state(output: Any) -> Tensor | None:
    """Return the hidden states in what a block returned: itself, or the first of several."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


class Reached(BaseException):
    """Ends a forward pass; no model catches what is not an `Exception`."""


def output_of(name: str, block: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """Return the hidden states that ``block`` makes in a forward pass, which ends there.

    What comes before the block has no graph; the block has one where gradients are enabled.

    Args:
        name: Of the block, for errors.
        block: A module of the model.
        forward: Calls the model.

    Raises:
        LowRankError: If the forward pass does not call the block, or it returns no hidden states.
    """
    enabled, outputs = torch.is_grad_enabled(), list[Any]()

    def before(*_: Any) -> None:
        torch.set_grad_enabled(enabled)  # until no_grad, below, puts back what was there before

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise Reached

    register = partial(block.register_forward_pre_hook, before), partial(block.register_forward_hook, after)
    with contextlib.suppress(Reached), hooked(one() for one in register), torch.no_grad():
        forward()
    hidden = hidden_state(outputs[0]) if outputs else None
    if hidden is None:
        what = f"returns {type(outputs[0]).__name__}, no hidden states" if outputs else "is not called"
        raise LowRankError(f"{name} {what}, so the model cannot be recovered block by block.")
    return hidden


@contextlib.contextmanager
def outputs_of(blocks: Iterable[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Give a dictionary that each forward pass fills with the blocks' hidden states, by position."""
    found: dict[int, Tensor] = {}

    def listen(position: int, block: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_state(output)
            if hidden is not None:
                found[position] = hidden

        return block.register_forward_hook(hook)

    try:
        with hooked(listen(position, block) for position, block in enumerate(blocks)):
            yield found
    finally:
        found.clear()

"""Share one training run among the processes of `torch.distributed`; in a single process nothing is done.

Whoever starts the processes (`torchrun`, `accelerate launch`) has initialised the process group before.
What speaks to the other processes must be called by all of them, in the same order. All then hold the same
value, bit for bit, so that each can decide alone, and alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank.errors import LowRankError

Item = TypeVar("Item")


def processes() -> int:
    """Return how many processes share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `torch.nn.parallel.DistributedDataParallel`, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def check_whole(model: nn.Module) -> None:
    """Check that every process has the whole model.

    Raises:
        LowRankError: If its parameters are sharded.
    """
    if processes() == 1:
        return
    from torch.distributed.fsdp import FullyShardedDataParallel  # slow to import
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded or any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise LowRankError(
            f"{type(model).__name__} is sharded over processes. Give every process the whole model, and "
            "shard it afterwards."
        )


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's part: every item belongs to exactly one process."""
    return items[process_number() :: processes()]


def agreed(value: float, device: torch.device) -> float:
    """Return the ``value`` of process 0."""
    if processes() == 1:
        return value
    sent = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(sent, 0)
    return float(sent)


def total(value: float, device: torch.device) -> float:
    """Return the sum of ``value`` over processes; not finite if one of them is not."""
    if processes() == 1:
        return value
    sent = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(sent)
    return float(sent)


def check_alike(number: int, device: torch.device, error: LowRankError) -> None:
    """Raise ``error`` in every process unless all have the same ``number``, of at most 64 bits."""
    if processes() == 1:
        return
    mine = torch.tensor(number, dtype=torch.int64, device=device)
    first = mine.clone()
    dist.broadcast(first, 0)
    if total(float(mine != first), device):
        raise error


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` in place with those of process 0."""
    if processes() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().contiguous()  # factors may be transposed, which backends do not send
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, zero where a process has none.

    All of one dtype go in one message, since the many small ones of norms and biases cost more in waiting.
    """
    if processes() == 1:
        return
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        group = [parameter for parameter in parameters if parameter.dtype == dtype]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= processes()
        for parameter, mean in zip(group, torch.split(flat, [p.numel() for p in group]), strict=True):
            parameter.grad = mean.view(parameter.shape)

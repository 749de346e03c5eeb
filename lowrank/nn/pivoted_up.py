"""`PivotedUp`: the second factor of pivoted factors, some of whose outputs are its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError, RankError
from lowrank.linalg import linear
from lowrank.linalg.pivots import Pivots


class PivotedUp(nn.Module):
    """Compute ``y = P [z; A z] + b`` of the pivots ``z (…, rank)``; the source is `lowrank.linalg.pivots`.

    ``A`` is a plain `torch.nn.Linear` called ``rest``. What is stored is ``A``; what computes depends on the
    inputs. For many tokens ``P [I; A]`` is written out, which copies few numbers, and multiplied once:
    putting the outputs in order would take longer than the products that are saved. For few tokens, and in
    compiled and exported graphs, the outputs are put in order.

    Args:
        rank: Size of the input vectors.
        out_features: Size of the output vectors, at least ``rank``.
        bias: The bias ``(out,)``, which is shared, or ``None``.
        device, dtype: As for `torch.nn.Linear`.

    Attributes:
        order: For each output its place in ``[z; A z]``, ``(out,)``, int32.
    """

    order: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        rank: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank >= out_features:
            raise RankError(f"rank {rank} of {out_features} outputs leaves none to compute from the pivots.")
        self.in_features, self.out_features = rank, out_features
        self.rest = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(out_features, device=device, dtype=torch.int32))
        self.register_parameter("bias", bias)

    @classmethod
    def from_pivots(cls, found: Pivots, bias: nn.Parameter | None = None) -> PivotedUp:
        """Wrap ``order`` and ``rest`` without copying."""
        rank = found.rest.shape[1]
        new = cls(rank, len(found.order), bias, device="meta")
        new.rest.weight = nn.Parameter(found.rest)
        new.order = found.order
        return new

    def plain(self) -> nn.Linear:
        """Return the layer that computes the same by one product, with the same bias."""
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(self.weight.detach())
        new.register_parameter("bias", self.bias)
        return new

    @property
    def stored_bytes(self) -> int:
        """Bytes of ``A`` and the order; the bias is the layer's."""
        return self.rest.weight.nbytes + self.order.nbytes

    @property
    def weight(self) -> Tensor:
        """``P [I; A]``, ``(out, rank)``, written out anew at each call."""
        rest = self.rest.weight
        identity = torch.eye(self.in_features, device=rest.device, dtype=rest.dtype)
        return torch.cat([identity, rest]).index_select(0, self.order)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, rank)`` to ``(…, out)``."""
        many = input.numel() > self.in_features**2
        if many and not torch.compiler.is_compiling() and self._is_plain():
            return linear(input, self.weight, self.bias)
        output = torch.cat([input, self.rest(input)], -1).index_select(-1, self.order)
        return output if self.bias is None else output + self.bias

    def _is_plain(self) -> bool:
        """Tell whether nobody could see that ``rest`` is not called."""
        rest = self.rest
        hooks = (rest._forward_hooks, rest._forward_pre_hooks, rest._backward_hooks, rest._backward_pre_hooks)
        return type(rest) is nn.Linear and not any(hooks) and "forward" not in rest.__dict__

    @staticmethod
    def check_stored(file: object, name: str, order: Tensor) -> None:
        """Refuse an ``order`` from ``file`` that is no permutation: it would read what is not there.

        Raises:
            CheckpointError: If some place is missing, or is there twice.
        """
        if not torch.equal(
            order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device)
        ):
            raise CheckpointError(
                f"{file}: the tensor {name}.order is no order of {len(order)} outputs. The file is "
                "damaged: copy it again."
            )

    def extra_repr(self) -> str:
        """Describe the layer as `torch.nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

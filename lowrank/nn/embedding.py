"""`LowRankEmbedding`: the embedding that takes the place of a dense one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank import arguments
from lowrank.arguments import accepts, flag, is_whole, optional, whole
from lowrank.errors import RankError
from lowrank.linalg import linear
from lowrank.linalg.matmul import row_major, without_autocast
from lowrank.nn.layer_types import FLOATING_DTYPE, MATRIX, PARAMETER, check_padding
from lowrank.nn.linear import dequantized_weight


class LowRankEmbedding(nn.Module):
    """Look up rows of ``E = D Uᵀ + 1 bᵀ``, two thin matrices in place of one, as `torch.nn.Embedding` does.

    ``D`` is a plain `torch.nn.Embedding` and ``U`` with ``b`` a plain `torch.nn.Linear`, both of which may be
    quantized afterwards, as the factors of `LowRankLinear` may. The buffer ``weight`` has no elements: it
    answers code that reads ``weight.dtype``, and makes a load without `lowrank` fail, not initialise at
    random.

    Args:
        num_embeddings, embedding_dim: Shape of the embedding.
        rank: Inner size.
        bias: Whether every row has ``b (embedding_dim,)`` added, the mean row.
        padding_idx: As for `torch.nn.Embedding`; it concerns training only. ``D`` has it, so what that row
            returns moves with ``U``, but stays zero if it is zero and there is no bias.
        device, dtype: As for `torch.nn.Embedding`.

    Attributes:
        relative_error: Of the product under the plan's metric when it was made from a dense embedding, before
            any training; ``None`` if not known.

    Example:
        >>> embedding = LowRankEmbedding(1000, 64, rank=8)
        >>> embedding(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    weight: Tensor
    layer_type = "embedding"

    @accepts(
        num_embeddings=whole(1),
        embedding_dim=whole(1),
        bias=flag,
        device=optional(arguments.device),
        dtype=optional(FLOATING_DTYPE),
    )
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        bias: bool = False,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        largest = min(num_embeddings, embedding_dim)
        if not is_whole(rank) or not 1 <= rank <= largest:
            raise RankError(
                f"rank {rank!r} of an embedding of {num_embeddings} rows of {embedding_dim}: "
                f"give a whole number from 1 to {largest}."
            )
        rank = int(rank)
        check_padding(padding_idx, num_embeddings)
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.relative_error: float | None = None
        self.down = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.up = nn.Linear(rank, embedding_dim, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.empty(0, embedding_dim, device=device, dtype=dtype))

    @property
    def bias(self) -> nn.Parameter | None:
        """What is added to every row, ``(embedding_dim,)``, or ``None``."""
        return self.up.bias

    @classmethod
    @accepts(left=MATRIX, right=MATRIX, bias=optional(PARAMETER))
    def from_factors(
        cls,
        left: Tensor,
        right: Tensor,
        bias: nn.Parameter | None = None,
        *,
        padding_idx: int | None = None,
        relative_error: float | None = None,
    ) -> LowRankEmbedding:
        """Wrap ``left (num_embeddings, rank)``, which is not copied, and ``right (rank, embedding_dim)``."""
        rank, width = right.shape
        if left.shape[1] != rank:
            raise RankError(
                f"left {tuple(left.shape)} and right {tuple(right.shape)} have no product: give "
                "(num_embeddings, rank) and (rank, embedding_dim)."
            )
        embedding = cls(len(left), width, rank, bias is not None, padding_idx=padding_idx, device="meta")
        embedding.down.weight = nn.Parameter(row_major(left))
        embedding.up.weight = nn.Parameter(row_major(right.T.contiguous()))
        embedding.up.register_parameter("bias", bias)
        embedding.weight = left.new_empty(0, width)
        embedding.relative_error = relative_error
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        """Map indices ``(…)`` to rows ``(…, embedding_dim)``."""
        rows: Tensor = self.up(self.down(input))
        return rows

    def enter(self, input: Tensor) -> Tensor:
        """Map ``x (…, embedding_dim)`` to ``Uᵀ x (…, rank)``: ``E x`` is ``D`` times that, without a bias."""
        return linear(input, dequantized_weight(self.up).T.to(input.dtype))

    @without_autocast()
    def dense_weight(self) -> Tensor:
        """Multiply the factors back into an embedding ``(num_embeddings, embedding_dim)``."""
        rows = dequantized_weight(self.down) @ dequantized_weight(self.up).T
        return rows if self.bias is None else rows + self.bias

    def extra_repr(self) -> str:
        """Describe the embedding as `torch.nn.Embedding` does, with its rank."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"

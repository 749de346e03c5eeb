"""`TiedLinear`: a layer that uses the weight of another module, of which there is one copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.linalg import linear
from lowrank.linalg.products import transformed
from lowrank.nn.embedding import LowRankEmbedding
from lowrank.nn.linear import weight_of
from lowrank.nn.quantized import QuantizedEmbedding, QuantizedLinear


class TiedLinear(nn.Module):
    """Compute ``y = E x + b`` with the table ``E`` of an embedding that is factorized or coded.

    The output head of a language model does that with the table of its inputs. The table is not registered
    here: its parameters move, train and are saved with the embedding, and whoever trains one trains both. The
    buffer ``weight`` has no elements, but as many rows as the layer has outputs, since transformers fits the
    bias to them. It marks the layer in a checkpoint, as in `LowRankLinear`.

    Args:
        owner: The embedding.
        bias: The layer's own, ``(num_embeddings,)``, or ``None``.
        kind: Name of the dense layer that it stands for (`lowrank.nn.dense`).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        owner: LowRankEmbedding | QuantizedEmbedding,
        bias: nn.Parameter | None = None,
        *,
        kind: str = "linear",
    ) -> None:
        super().__init__()
        self.__dict__["_owner"] = owner
        self.in_features, self.out_features = owner.embedding_dim, owner.num_embeddings
        self.kind = kind
        like: Tensor = owner.weight
        self.register_buffer("weight", like.new_empty(self.out_features, 0))
        self.register_parameter("bias", bias)

    @property
    def owner(self) -> LowRankEmbedding | QuantizedEmbedding:
        """The embedding whose table this is."""
        return self.__dict__["_owner"]  # type: ignore[no-any-return]

    @property
    def rank(self) -> int | None:
        """Inner size of the table's factors; ``None`` if it is whole."""
        return self.owner.rank if isinstance(self.owner, LowRankEmbedding) else None

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token."""
        if self.rank is None:
            return self.in_features * self.out_features
        return self.rank * (self.in_features + self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``."""
        table: nn.Module = self.owner
        common = None
        if isinstance(table, LowRankEmbedding):
            if table.bias is not None:  # the same for all rows
                common = (input * table.bias.to(input.dtype)).sum(-1, keepdim=True)
            input, table = table.enter(input), table.down
        if isinstance(table, QuantizedEmbedding) and not transformed():
            output: Tensor = self._around(table)(input)
        else:
            output = linear(input, weight_of(table).to(input.dtype), self._bias_in(input.dtype))
        return output if common is None else output + common

    def runs_on(self) -> str:
        """Name what multiplies at inference, as `QuantizedLinear.runs_on`; ``"float"`` without codes."""
        table = self.owner.down if isinstance(self.owner, LowRankEmbedding) else self.owner
        return self._around(table).runs_on() if isinstance(table, QuantizedEmbedding) else "float"

    def dense_weight(self) -> Tensor:
        """Return ``E``, ``(out, in)``, in the dtype of ``weight``."""
        return self.owner.dense_weight()

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return self.bias.to(dtype) if self.bias is not None else None

    def _around(self, table: QuantizedEmbedding) -> QuantizedLinear:
        """Return a linear layer around the codes of ``table``; made anew once they have moved.

        Where an int4 kernel reads them in an order of its own, the layer comes to have its own copy of the
        codes: rows are looked up in the table's, and decoding the whole table takes seven times that room.
        """
        codes, scale, layer = self.__dict__.get("_linear", (None, None, None))
        if codes is not table.codes or scale is not table.scale:
            rows, columns = table.shape
            layer = QuantizedLinear(columns, rows, False, table.scheme, device="meta")
            layer.codes, layer.scale = table.codes, table.scale
            layer.weight = table.weight.new_empty(0)
            self.__dict__["_linear"] = table.codes, table.scale, layer
        layer.register_parameter("bias", self.bias)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer as `torch.nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight of {type(self.owner).__name__}"
        )

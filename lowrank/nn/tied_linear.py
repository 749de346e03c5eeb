"""`TiedLinear`: a layer that uses the weight of another module, of which there is one copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.linalg import linear
from lowrank.linalg.matmul import is_transformed
from lowrank.nn.embedding import LowRankEmbedding
from lowrank.nn.linear import LowRankLinear, dequantized_weight
from lowrank.nn.quantized import QuantizedEmbedding
from lowrank.nn.quantized_linear import QuantizedLinear

Owner = LowRankEmbedding | QuantizedEmbedding | LowRankLinear | QuantizedLinear


class TiedLinear(nn.Module):
    """Compute ``y = W x + b`` with a weight that another module has in factors or codes.

    That is the embedding of an embedding, which the output head of a language model multiplies by, or the
    weight of a linear layer that had the same or an equal one. It is not registered here: its parameters
    move, train and are saved with their owner, and whoever trains one trains both. The buffer ``weight`` has
    no elements, but as many rows as the layer has outputs, since transformers fits the bias to them. It marks
    the layer in a checkpoint, as in `LowRankLinear`.

    Args:
        owner: The embedding or linear layer.
        bias: The layer's own, ``(out,)``, or ``None``.
        layer_type: Name of the dense layer that it stands for (`lowrank.nn.layer_types`).
        was_copy: Whether that layer had a weight of its own, equal to the owner's; if not, they were tied.

    Attributes:
        trainable: Whether that layer's weight had gradients, as it will have when it is dense again.
    """

    trainable: bool = True
    bias: nn.Parameter | None

    def __init__(
        self,
        owner: Owner,
        bias: nn.Parameter | None = None,
        *,
        layer_type: str = "linear",
        was_copy: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__["_owner"] = owner
        self.in_features, self.out_features = _sizes(owner)
        self.layer_type, self.was_copy = layer_type, was_copy
        like: Tensor = owner.weight  # type: ignore[assignment]
        self.register_buffer("weight", like.new_empty(self.out_features, 0))
        self.register_parameter("bias", bias)
        self._linear: tuple[Tensor, QuantizedLinear] | None = None  # an embedding's codes, and what has them

    @property
    def owner(self) -> Owner:
        """The module whose weight this is."""
        return self.__dict__["_owner"]  # type: ignore[no-any-return]

    @property
    def rank(self) -> int | None:
        """Inner size of the weight's factors; ``None`` if it is whole."""
        return self.owner.rank if isinstance(self.owner, (LowRankEmbedding, LowRankLinear)) else None

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token."""
        dense = self.in_features * self.out_features
        if self.rank is None:
            return dense
        corrects = isinstance(self.owner, LowRankLinear) and self.owner.base is not None
        return self.rank * (self.in_features + self.out_features) + (dense if corrects else 0)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``."""
        embedding = self.owner
        if isinstance(embedding, QuantizedLinear):
            return embedding.multiply(input, self.bias)
        if isinstance(embedding, LowRankLinear):
            return self._through(embedding, input)
        return self._by_table(embedding, input)

    def _through(self, layer: LowRankLinear, input: Tensor) -> Tensor:
        """Multiply by the factors of ``layer``, and by what they correct."""
        output = _product(layer.up, _product(layer.down, input, None), self.bias)
        return output if layer.base is None else output + layer.base(input)

    def _by_table(self, embedding: nn.Module, input: Tensor) -> Tensor:
        common = None
        if isinstance(embedding, LowRankEmbedding):
            if embedding.bias is not None:  # the same for all rows
                common = (input * embedding.bias.to(input.dtype)).sum(-1, keepdim=True)
            input, embedding = embedding.enter(input), embedding.down
        output: Tensor | None = None
        if isinstance(embedding, QuantizedEmbedding):
            if not is_transformed():
                output = self._around(embedding)(input)
            elif self._linear is not None and self._linear[0] is embedding.codes:
                output = self._linear[1].multiply(input, self.bias)
            else:  # in a graph no layer can be made
                output = embedding.by_integers(input, self.bias)
        if output is None:
            output = linear(input, dequantized_weight(embedding).to(input.dtype), self._bias_in(input.dtype))
        return output if common is None else output + common

    def runs_on(self) -> str:
        """Name what multiplies at inference, as `QuantizedLinear.runs_on`; ``"float"`` without codes."""
        factors = isinstance(self.owner, (LowRankEmbedding, LowRankLinear))
        part: nn.Module = self.owner.down if factors else self.owner  # type: ignore[assignment]
        if isinstance(part, QuantizedLinear):
            return part.runs_on()
        return self._around(part).runs_on() if isinstance(part, QuantizedEmbedding) else "float"

    def dense_weight(self) -> Tensor:
        """Return ``W``, ``(out, in)``, in the dtype of ``weight``."""
        return self.owner.dense_weight()

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return self.bias.to(dtype) if self.bias is not None else None

    def _around(self, embedding: QuantizedEmbedding) -> QuantizedLinear:
        """Return a linear layer around the codes of ``embedding``; made anew once they have moved.

        Where an int4 kernel reads them in an order of its own, the layer comes to have its own copy of the
        codes: rows are looked up in the embedding's, and dequantizing the whole embedding takes seven times
            that room.
        """
        known = self._linear
        if known is not None and known[0] is embedding.codes and known[1].scale is embedding.scale:
            layer = known[1]
        else:
            rows, columns = embedding.shape
            layer = QuantizedLinear(columns, rows, False, embedding.scheme, device="meta")
            layer.codes, layer.scale = embedding.codes, embedding.scale
            layer.weight = embedding.weight.new_empty(0)
            self._linear = embedding.codes, layer
        layer.register_parameter("bias", self.bias)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer as `torch.nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight of {type(self.owner).__name__}"
        )


def _sizes(owner: Owner) -> tuple[int, int]:
    """Return inputs and outputs of a layer with the weight of ``owner``."""
    if isinstance(owner, (LowRankLinear, QuantizedLinear)):
        return owner.in_features, owner.out_features
    return owner.embedding_dim, owner.num_embeddings


def _product(factor: nn.Module, input: Tensor, bias: nn.Parameter | None) -> Tensor:
    """Multiply by a factor of another layer, with ``bias`` in place of its own.

    A ``down`` that keeps its product for layers with the same input is not called: this input is another.
    """
    if isinstance(factor, QuantizedLinear):
        return factor.multiply(input, bias)
    added = bias.to(input.dtype) if bias is not None else None
    return linear(input, dequantized_weight(factor).to(input.dtype), added)

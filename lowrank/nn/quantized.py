"""`QuantizedModule`, what all modules with a weight of integers have in common, and `QuantizedEmbedding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank import arguments
from lowrank.arguments import accepts, instance, optional, whole
from lowrank.errors import CheckpointError, SchemeError, WeightError
from lowrank.linalg import Scheme, dequantize_weight, quantize_weight
from lowrank.linalg.matmul import is_compiled, is_transformed
from lowrank.nn import integer_matmul
from lowrank.nn.layer_types import FLOATING_DTYPE, check_padding

SCHEME = instance(Scheme, 'a Scheme, such as Scheme("int8")', SchemeError)


class QuantizedModule(nn.Module):
    """A module with a weight ``(rows, columns)`` as integers. Its buffer ``weight`` has no elements.

    That buffer answers code that reads ``weight.dtype`` or ``.device``, and makes a load without
    `lowrank` fail instead of initialising at random, as in `LowRankLinear`.

    Attributes:
        shape: Of the weight, ``(rows, columns)``.
        scheme: How it is quantized.
        trainable: Whether the weight had gradients before it was quantized, as it will have when it is
            dequantized.
        BUFFER_NAMES: The names of the buffers that a quantized weight may have.
    """

    BUFFER_NAMES: ClassVar[tuple[str, ...]] = ("codes", "scale", "smooth_scale", "input_shift")
    trainable: bool = True
    codes: Tensor
    scale: Tensor
    weight: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        scheme: Scheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        scheme.check(rows, columns)
        self.scheme = scheme
        self.shape = rows, columns
        for name, (shape, stored_as) in scheme.tensors(rows, columns).items():
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=stored_as))
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def check_stored(cls, file: str | Path, name: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> None:
        """Refuse values among ``tensors``, by their names in ``file``, which quantizing never gives.

        Such values show that the tensors of the module called ``name`` are not of one weight, or not of this
        ``scheme``.

        Raises:
            CheckpointError: If there are such values.
        """
        possible: dict[str, Callable[[Tensor], bool]] = {
            "codes": scheme.storage.are_possible_codes,
            "scale": scheme.storage.are_possible_scales,
            "smooth_scale": lambda smooth_scale: bool((smooth_scale > 0).all()),
            "input_shift": _all_finite,
        }
        for buffer in cls.BUFFER_NAMES:
            stored = tensors.get(f"{name}.{buffer}")
            if stored is not None and not possible[buffer](stored):
                raise CheckpointError(
                    f"{file}: the tensor {name}.{buffer} has values that no quantized weight has. "
                    "The file is damaged: copy it again."
                )

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales, and what is done to inputs."""
        return sum(tensor.nbytes for tensor in self.buffers())  # `weight` has none

    def dense_weight(self) -> Tensor:
        """Return ``scale · codes``, ``(rows, columns)``, in the dtype of ``weight``."""
        return dequantize_weight(self.codes, self.scale, self.scheme, self.weight.dtype)

    def by_integers(
        self,
        input: Tensor,
        bias: Tensor | None,
        smooth_scale: Tensor | None = None,
        input_shift: Tensor | None = None,
    ) -> Tensor | None:
        """Return ``W (s·x − c) + b`` for ``x (…, columns)`` by integer products, ``(…, rows)``, if they can.

        ``None`` where they cannot: gradients, tracing (`torch.compile` can), int4, few rows of ``x``, or a
        device or processor without the instructions. Arguments as for `lowrank.nn.integer_matmul`.
        """
        plain = not is_transformed() or is_compiled()
        if not (plain and self.scheme.storage.kernel == "int8" and only_output(input, bias, self.shape[1])):
            return None
        rows = input.reshape(-1, self.shape[1])
        fewest = integer_matmul.fewest_integer_rows(*self.shape, rows.device)
        if fewest is None or len(rows) < fewest:
            return None
        given, step = integer_matmul.quantized(rows, smooth_scale, input_shift)
        added = bias.detach().to(torch.float32) if bias is not None else None
        output = integer_matmul.integer_product(given, step, self.codes, self.scale, added)
        return output.to(input.dtype).reshape(*input.shape[:-1], self.shape[0])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move, but never convert codes and scales: ``.half()`` concerns what the layer computes in."""
        kept = {name: value for name, value in self._buffers.items() if name != "weight"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _take(self, quantized: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self.codes, self.scale = quantized
        self.weight = torch.empty(self.weight.shape, device=self.codes.device, dtype=dtype)


class QuantizedEmbedding(QuantizedModule):
    """Look up rows of ``scale · codes``, as `torch.nn.Embedding` does; only the rows asked for are
    dequantized.

    Args:
        num_embeddings, embedding_dim: Shape of the embedding.
        scheme: How it is quantized.
        padding_idx: As for `torch.nn.Embedding`; it concerns training only.
        device, dtype: ``dtype`` is that of the output.
    """

    @accepts(
        num_embeddings=whole(1),
        embedding_dim=whole(1),
        scheme=SCHEME,
        device=optional(arguments.device),
        dtype=optional(FLOATING_DTYPE),
    )
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_padding(padding_idx, num_embeddings)
        super().__init__(num_embeddings, embedding_dim, scheme, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.weight = self.weight.reshape(0, embedding_dim)  # who resizes an embedding asks for two sizes

    @classmethod
    @accepts(
        embedding=instance(nn.Embedding, "a torch.nn.Embedding", WeightError),
        scheme=SCHEME,
        moments=optional(instance(Tensor, "a matrix (embedding_dim, embedding_dim)", WeightError)),
    )
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: Scheme, moments: Tensor | None = None
    ) -> QuantizedEmbedding:
        """Quantize the rows of ``embedding``, which must have no ``max_norm``.

        Args:
            embedding: The embedding.
            scheme: How to store it.
            moments: ``G (embedding_dim, embedding_dim)``, how much an error ``δ`` in a row counts,
                ``δᵀ G δ``; without it every element is rounded on its own.

        Raises:
            WeightError: If the embedding has a ``max_norm``, or ``moments`` are of another shape, or not
                finite.

        Example:
            >>> embedding = QuantizedEmbedding.from_embedding(nn.Embedding(10, 4), Scheme("int8"))
            >>> embedding(torch.tensor([1, 2])).shape
            torch.Size([2, 4])
        """
        if embedding.max_norm is not None:
            raise WeightError("an embedding with max_norm changes its weight as it is read.")
        sizes = embedding.num_embeddings, embedding.embedding_dim
        if moments is not None and (moments.shape != sizes[1:] * 2 or not bool(moments.isfinite().all())):
            raise WeightError(
                f"moments: of shape {tuple(moments.shape)}; give a finite matrix of {(sizes[1:] * 2)}."
            )
        new = cls(*sizes, scheme, padding_idx=embedding.padding_idx, device="meta")
        new._take(quantize_weight(embedding.weight, scheme, moments), embedding.weight.dtype)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Map indices ``(…)`` to rows ``(…, embedding_dim)``."""
        codes, scale = (nn.functional.embedding(input, embedding) for embedding in (self.codes, self.scale))
        return dequantize_weight(codes, scale, self.scheme, self.weight.dtype)

    def extra_repr(self) -> str:
        """Describe the embedding as `torch.nn.Embedding` does, with its scheme."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.name}"


def _all_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def only_output(input: Tensor, bias: Tensor | None, features: int) -> bool:
    """Tell whether nothing but the output is asked for: kernels know no gradients, and no subclasses.

    Inputs of another size are left to PyTorch, for its error.
    """
    if type(input) is not Tensor or input.shape[-1] != features or not input.numel():
        return False
    trains = input.requires_grad or (bias is not None and bias.requires_grad)
    return not (trains and torch.is_grad_enabled())

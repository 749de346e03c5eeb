"""`QuantizedLinear` and `QuantizedEmbedding`: layers whose weight is integers, in memory and in the file.

``int8`` linear layers multiply integers by integers: the input is quantized anew at each call, with one
scale per row. On a CPU oneDNN multiplies, with the codes in its own order: the layer then holds them in that
order only, and gives them back when asked for its state. On CUDA it is ``torch._int_mm``. Everything else
(``int4``, gradients, compilers, export) multiplies by ``scale · codes``. `QuantizedLinear.runs_on` tells.

Where the inputs' statistics are known, a layer codes ``W diag(s)⁻¹`` and reads ``s·x − c``: features of
unlike size no longer share one scale, and their mean, which the bias has, takes no room. Source: SmoothQuant
(Xiao et al. 2022, arXiv:2211.10438); the shift as in Outlier Suppression+ (Wei et al. 2023,
arXiv:2304.09145). Both are stored as float16, and what they are rounded to is what the weight makes up for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import WeightError
from lowrank.linalg import Scheme, decode, encode, linear
from lowrank.linalg.products import transformed

FEWEST_ON_CUDA = 2**32
"""From how many multiply-accumulates on integers are faster on CUDA: quantizing inputs takes six kernels."""


class Coded(nn.Module):
    """A module with a weight ``(rows, columns)`` as integers. Its buffer ``weight`` has no elements.

    That buffer answers code that reads ``weight.dtype`` or ``.device``, and makes a load without
    `lowrank` fail instead of initialising at random, as in `LowRankLinear`.

    Attributes:
        shape: Of the weight, ``(rows, columns)``.
        scheme: How it is coded.
    """

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
        self._shapes = scheme.shapes(rows, columns)
        for name, shape, kind in zip(("codes", "scale"), self._shapes, scheme.dtypes, strict=True):
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=kind))
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        codes, scale = (
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(self._shapes, self.scheme.dtypes, strict=True)
        )
        return codes + scale

    def dense_weight(self) -> Tensor:
        """Return ``scale · codes``, ``(rows, columns)``, in the dtype of ``weight``."""
        return decode(self.codes, self.scale, self.scheme, self.weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move, but never convert codes and scales: ``.half()`` concerns what the layer computes in."""
        kept = {name: value for name, value in self._buffers.items() if name != "weight"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _set(self, weight: Tensor, moments: Tensor | None = None) -> None:
        self.codes, self.scale = encode(weight, self.scheme, moments)
        self.weight = weight.detach().new_empty(0)


class QuantizedLinear(Coded):
    """Compute ``y = Wx + b`` with ``W ≈ scale · codes``.

    Args:
        in_features, out_features: Sizes of the input and output vectors.
        bias: Whether to add a bias ``(out,)``.
        scheme: How the weight is coded.
        kind: Name of the dense layer that it stands for (`lowrank.nn.dense`).
        smooth, centred: Whether inputs are scaled, and shifted, before they meet the codes.
        device, dtype: Of the bias, and of what the layer computes in.
    """

    bias: nn.Parameter | None
    smooth: Tensor | None
    center: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        *,
        kind: str = "linear",
        smooth: bool = False,
        centred: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, scheme, device, dtype)
        for name, wanted in (("smooth", smooth), ("center", centred)):
            row = torch.zeros(in_features, device=device, dtype=torch.float16) if wanted else None
            self.register_buffer(name, row)
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self._packed: Tensor | None = None
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None,
        scheme: Scheme,
        *,
        kind: str = "linear",
        smooth: Tensor | None = None,
        center: Tensor | None = None,
        moments: Tensor | None = None,
    ) -> QuantizedLinear:
        """Code ``weight (out, in)``; the bias is shared, and must make up for ``center`` already.

        ``moments (in, in)`` are of the input as the layer is given it; see `lowrank.linalg.encode`.

        Example:
            >>> layer = QuantizedLinear.from_weight(torch.eye(4), None, Scheme("int8"))
            >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).round(decimals=1)
            tensor([[1., 2., 3., 4.]])
        """
        layer = cls(weight.shape[1], weight.shape[0], False, scheme, kind=kind, device="meta")
        if smooth is not None:
            weight = weight / smooth.to(weight.dtype)
            scale = smooth.to(torch.float64)
            moments = moments * scale[:, None] * scale if moments is not None else None
        layer._set(weight, moments)
        layer.smooth, layer.center = smooth, center
        layer.register_parameter("bias", bias)
        return layer

    def runs_on(self) -> str:
        """Name what multiplies at inference: ``"onednn int8"``, ``"cuda int8"`` or ``"dequantized"``."""
        if self.scheme.name != "int8":
            return "dequantized"
        if self.scale.is_cuda:
            return "cuda int8" if self.in_features % 8 == self.out_features % 8 == 0 else "dequantized"
        return "onednn int8" if _ONEDNN and self.scale.device.type == "cpu" else "dequantized"

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``."""
        trains = torch.is_grad_enabled() and (
            input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )
        if not trains and type(input) is Tensor and input.numel() and not transformed():
            on = self.runs_on()
            if on == "onednn int8":
                return self._by_onednn(input)
            if on == "cuda int8" and input.numel() * self.out_features >= FEWEST_ON_CUDA:
                return self._on_cuda(input)
        weight = decode(self._dense_codes(), self.scale, self.scheme, input.dtype)
        bias = self.bias.to(input.dtype) if self.bias is not None else None
        return linear(self._prepared(input), weight, bias)

    def dense_weight(self) -> Tensor:
        """Return the weight that multiplies the layer's input, ``(out, in)``, in the dtype of ``weight``."""
        weight = decode(self._dense_codes(), self.scale, self.scheme)
        return (weight if self.smooth is None else weight * self.smooth).to(self.weight.dtype)

    def shift(self) -> Tensor | None:
        """Return what ``center`` takes from the output, ``(out,)``, so that ``y = Wx − shift + b``."""
        if self.center is None:
            return None
        return decode(self._dense_codes(), self.scale, self.scheme) @ self.center.float()

    def _prepared(self, input: Tensor) -> Tensor:
        """Return ``s·x − c``, in the dtype of the input."""
        if self.smooth is None:
            return input
        smooth = self.smooth.to(input.dtype)
        if self.center is None:
            return input * smooth
        return torch.addcmul(-self.center.to(input.dtype), input, smooth)

    def _by_onednn(self, input: Tensor) -> Tensor:
        rows, step = self._rows(input)
        given = torch.addcmul(rows.new_full((), 128.5), rows, 1 / step).to(
            torch.uint8
        )  # rounds, by cutting off
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(given, 1.0, 128, self._pack(), self.scale[:, 0], self._zeros(), None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return self._finished(output, step, input)

    def _on_cuda(self, input: Tensor) -> Tensor:
        rows, step = self._rows(input)
        missing = max(0, 17 - len(rows))  # the kernel wants more than 16 rows
        given = torch.nn.functional.pad((rows / step).round().to(torch.int8), (0, 0, 0, missing))
        product = torch._int_mm(given, self.codes.T)[: len(rows)]
        return self._finished(product * self.scale[:, 0], step, input)

    def _rows(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prepared input as rows in float32, and of each row the step of its integers."""
        rows = self._prepared(input.reshape(-1, self.in_features).float())
        return rows, rows.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(127)

    def _finished(self, output: Tensor, step: Tensor, input: Tensor) -> Tensor:
        """Scale the rows and add the bias; NaN and infinite rows become NaN here, by their step."""
        bias = self._bias_in(torch.float32)
        output = output.mul_(step) if bias is None else torch.addcmul(bias, output, step, out=output)
        return output.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return self.bias.detach().to(dtype) if self.bias is not None else None

    def _zeros(self) -> Tensor:
        return torch.zeros(self.out_features, dtype=torch.int64)

    def _pack(self) -> Tensor:
        """Return the codes in oneDNN's order, which from now on is the only one that the layer holds."""
        packed, codes = self._packed, self._buffers["codes"]
        if packed is None:
            assert codes is not None
            self._packed = packed = torch.ops.onednn.qlinear_prepack(codes, None)
            self._buffers["codes"] = None
        return packed

    def _dense_codes(self) -> Tensor:
        """Return the codes ``(out, in)``, whatever order they are held in."""
        packed = self._packed
        return self.codes if packed is None else packed.to_dense().T.contiguous()

    def _unpack(self) -> None:
        if self._packed is not None:
            self._buffers["codes"], self._packed = self._dense_codes(), None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:  # for copies
        self._unpack()
        return dict(vars(self))

    def extra_repr(self) -> str:
        """Describe the layer as `torch.nn.Linear` does, with its scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.scheme.name}, bias={self.bias is not None}"
        )


class QuantizedEmbedding(Coded):
    """Look up rows of ``scale · codes``, as `torch.nn.Embedding` does; only the rows asked for are decoded.

    Args:
        num_embeddings, embedding_dim: Shape of the table.
        scheme: How it is coded.
        padding_idx: As for `torch.nn.Embedding`; it concerns training only.
        device, dtype: ``dtype`` is that of the output.
    """

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
        super().__init__(num_embeddings, embedding_dim, scheme, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, table: nn.Embedding, scheme: Scheme) -> QuantizedEmbedding:
        """Code the table of ``table``, which must have no ``max_norm``.

        Example:
            >>> table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 4), Scheme("int8"))
            >>> table(torch.tensor([1, 2])).shape
            torch.Size([2, 4])
        """
        if table.max_norm is not None:
            raise WeightError("an embedding with max_norm changes its weight as it is read.")
        sizes = table.num_embeddings, table.embedding_dim
        new = cls(*sizes, scheme, padding_idx=table.padding_idx, device="meta")
        new._set(table.weight)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Map indices ``(…)`` to rows ``(…, embedding_dim)``."""
        return decode(self.codes[input], self.scale[input], self.scheme, self.weight.dtype)

    def extra_repr(self) -> str:
        """Describe the table as `torch.nn.Embedding` does, with its scheme."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.name}"


def _has_onednn() -> bool:
    """Return whether oneDNN's int8 product is there and this processor has the instructions for it."""
    capable = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()  # without VNNI, sums can saturate
    return bool(capable) and torch._C._has_mkldnn and hasattr(torch.ops.onednn, "qlinear_pointwise")


_ONEDNN = _has_onednn()

"""`QuantizedLinear`: ``y = Wx + b`` with a weight of integers, by the kernels that there are for them.

``int8`` layers multiply integers by integers (``torch._int_mm``): the input is quantized anew at each call,
with one scale per row. ``int4`` layers have a kernel for few rows (`lowrank.nn.integer_matmul`). Everything
else (gradients, export, processors without the instructions) multiplies by ``scale · codes``.
`QuantizedLinear.runs_on` tells.

Where the inputs' statistics are known, a layer quantizes ``W diag(s)⁻¹`` and reads ``s·x − c``: features of
unlike size no longer share one scale, and their mean, which the bias has, takes no room. Source: SmoothQuant
(Xiao et al. 2022, arXiv:2211.10438); the shift as in Outlier Suppression+ (Wei et al. 2023,
arXiv:2304.09145). Both are stored as float16, and what they are rounded to is what the weight makes up for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank import arguments
from lowrank.arguments import accepts, flag, optional, text, whole
from lowrank.errors import WeightError
from lowrank.linalg import Scheme, dequantize_weight, linear, quantize_scaled, requantize
from lowrank.linalg.matmul import is_compiled, is_transformed, without_autocast
from lowrank.linalg.quantization import pack_int4, scaled
from lowrank.nn import integer_matmul
from lowrank.nn.layer_types import FLOATING_DTYPE, MATRIX, PARAMETER, TENSOR
from lowrank.nn.quantized import SCHEME, QuantizedModule, only_output


class QuantizedLinear(QuantizedModule):
    """Compute ``y = Wx + b`` with ``W ≈ scale · codes``.

    Args:
        in_features, out_features: Sizes of the input and output vectors.
        bias: Whether to add a bias ``(out,)``.
        scheme: How the weight is quantized.
        layer_type: Name of the dense layer that it stands for (`lowrank.nn.layer_types`).
        smooth_scale, input_shift: Whether inputs are scaled, and shifted, before they meet the codes.
        device, dtype: Of the bias, and of what the layer computes in.
    """

    bias: nn.Parameter | None
    latent: nn.Parameter | None
    smooth_scale: Tensor | None
    input_shift: Tensor | None

    @accepts(
        in_features=whole(1),
        out_features=whole(1),
        bias=flag,
        scheme=SCHEME,
        layer_type=text(),
        smooth_scale=flag,
        input_shift=flag,
        device=optional(arguments.device),
        dtype=optional(FLOATING_DTYPE),
    )
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        *,
        layer_type: str = "linear",
        smooth_scale: bool = False,
        input_shift: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, scheme, device, dtype)
        for name, wanted in (("smooth_scale", smooth_scale), ("input_shift", input_shift)):
            row = torch.zeros(in_features, device=device, dtype=torch.float16) if wanted else None
            self.register_buffer(name, row)
        self.in_features, self.out_features, self.layer_type = in_features, out_features, layer_type
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_parameter("latent", None)
        self._kernel_scales: tuple[Tensor, Tensor] | None = (
            None  # of which scales, and as int4 kernels read them
        )

    @classmethod
    @accepts(
        weight=MATRIX,
        bias=optional(PARAMETER),
        scheme=SCHEME,
        layer_type=text(),
        smooth_scale=optional(TENSOR),
        input_shift=optional(TENSOR),
        moments=optional(MATRIX),
    )
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None,
        scheme: Scheme,
        *,
        layer_type: str = "linear",
        smooth_scale: Tensor | None = None,
        input_shift: Tensor | None = None,
        moments: Tensor | None = None,
    ) -> QuantizedLinear:
        """Code ``weight (out, in)``; the bias is shared, and must make up for ``input_shift`` already.

        ``moments (in, in)`` are of the input as the layer is given it; see `lowrank.linalg.quantize_weight`.

        Example:
            >>> layer = QuantizedLinear.from_weight(torch.eye(4), None, Scheme("int8"))
            >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).round(decimals=1)
            tensor([[1., 2., 3., 4.]])
        """
        inputs = weight.shape[1]
        sizes = {
            "smooth_scale": (smooth_scale, (inputs,)),
            "input_shift": (input_shift, (inputs,)),
            "moments": (moments, (inputs, inputs)),
        }
        for name, (given, wanted) in sizes.items():
            if given is not None and given.shape != wanted:
                raise WeightError(
                    f"{name} has shape {tuple(given.shape)}: give {wanted}, for {inputs} inputs."
                )
        layer = cls(inputs, weight.shape[0], False, scheme, layer_type=layer_type, device="meta")
        layer._take(quantize_scaled(weight, scheme, smooth_scale, moments), weight.dtype)
        layer.smooth_scale, layer.input_shift = smooth_scale, input_shift
        layer.register_parameter("bias", bias)
        return layer

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        smooth_scale: Tensor | None = None,
    ) -> QuantizedLinear:
        """Wrap what `quantize_scaled` gave, without a bias; the layer computes in ``dtype``."""
        columns = codes.shape[1] * scheme.storage.per_element
        layer = cls(columns, len(codes), False, scheme, device="meta")
        layer._take((codes, scale), dtype)
        layer.smooth_scale = smooth_scale
        return layer

    def runs_on(self) -> str:
        """Name what multiplies at inference; rows of the input are tokens.

        ``"int8"`` or ``"int8 (from … tokens)"`` for integers by integers, ``"int4 (up to … tokens)"`` for
        PyTorch's weight-only kernel; otherwise, and always with ``"dequantized"``, it is ``scale · codes``.
        """
        device, size = self.scale.device, self.scheme.group_size
        kernel = self.scheme.storage.kernel
        if kernel is None:
            return "dequantized"
        if kernel == "int4":
            assert size is not None  # of that scheme
            none = integer_matmul.why_no_int4_kernel(*self.shape, size, device) is not None
            return "dequantized" if none else f"int4 (up to {integer_matmul.MOST_ROWS[device.type]} tokens)"
        fewest = integer_matmul.fewest_integer_rows(*self.shape, device)
        if fewest is None:
            return "dequantized"
        return "int8" if fewest == 1 else f"int8 (from {fewest:,} tokens)"

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``."""
        return self.multiply(input, self.bias)

    def multiply(self, input: Tensor, bias: nn.Parameter | None) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)`` with another bias than the layer's own: for who uses its codes."""
        if self.latent is None:
            output = self.by_integers(input, bias, self.smooth_scale, self.input_shift)
            output = self._by_int4(input, bias) if output is None else output
            if output is not None:
                return output
        given = integer_matmul.prepared(input, self.smooth_scale, self.input_shift)
        added = bias.to(input.dtype) if bias is not None else None
        return linear(given, self._dequantized().to(input.dtype), added)

    def _dequantized(self) -> Tensor:
        """Return ``scale · codes``, in training with the gradient of what the codes are rounded from."""
        if self.latent is not None:
            return self._trained_weight()
        codes = self.codes
        if _as_stored(codes):
            return dequantize_weight(codes, self.scale, self.scheme)
        return scaled(integer_matmul.unpacked(codes, *self.shape), self.scale)

    def start_qat(self) -> None:
        """Let the codes be trained: from now on they are a floating-point weight, ``latent``, rounded.

        The gradient passes the rounding as if it were not there; the scales stay. Source: straight-through
        estimators (Bengio et al. 2013, arXiv:1308.3432).
        """
        self.latent = nn.Parameter(self._dequantized().detach())

    def finish_qat(self) -> None:
        """Round what `start_qat` has made trainable to codes again."""
        if self.latent is not None:
            self.codes = requantize(self.latent.detach(), self.scale, self.scheme)
            self.latent = None

    def _trained_weight(self) -> Tensor:
        assert self.latent is not None
        with torch.no_grad():
            codes = requantize(self.latent, self.scale, self.scheme)
            rounding = dequantize_weight(codes, self.scale, self.scheme) - self.latent
        return self.latent + rounding

    def dense_weight(self) -> Tensor:
        """Return the weight that multiplies the layer's input, ``(out, in)``, in the dtype of ``weight``."""
        weight = self._dequantized()
        return (weight if self.smooth_scale is None else weight * self.smooth_scale).to(self.weight.dtype)

    @without_autocast()
    def shift(self) -> Tensor | None:
        """Return what ``input_shift`` takes from the output, ``(out,)``, so that ``y = Wx − shift + b``."""
        if self.input_shift is None:
            return None
        return self._dequantized() @ self.input_shift.float()

    def dense_bias(self) -> nn.Parameter | None:
        """Return the bias that goes with `dense_weight`, for inputs from which nothing is taken."""
        shift = self.shift()
        if self.bias is None or shift is None:
            return self.bias
        bias = self.bias.detach().float() - shift
        return nn.Parameter(bias.to(self.bias.dtype), requires_grad=self.bias.requires_grad)

    def _by_int4(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return what `multiply` does by a kernel for int4 weights; ``None`` where there is none to use.

        `torch.compile` cannot bring codes into the kernel's order, and takes them as it finds them.
        """
        size, device = self.scheme.group_size, input.device
        if (
            self.scheme.storage.kernel != "int4"
            or size is None
            or not only_output(input, bias, self.in_features)
        ):
            return None
        if is_transformed():
            known = is_compiled() and not _as_stored(self.codes)
        else:
            known = integer_matmul.why_no_int4_kernel(*self.shape, size, device) is None
        rows = input.reshape(-1, self.in_features)
        if not known or len(rows) > integer_matmul.MOST_ROWS[device.type]:
            return None
        codes, scales = self._for_kernel()
        product = integer_matmul.int4_product_unseen if is_compiled() else integer_matmul.int4_product
        output = product(
            integer_matmul.prepared(rows, self.smooth_scale, self.input_shift), codes, scales, size
        )
        output = output.to(rows.dtype) + (bias.to(rows.dtype) if bias is not None else 0)
        return output.reshape(*input.shape[:-1], self.out_features)

    def _for_kernel(self) -> tuple[Tensor, Tensor]:
        """Return int4 codes and scales as the kernel reads them.

        The codes are kept in that order only, so that they do not take their room twice; whatever leaves
        the layer (its state, copies, moves) has them as they are stored.
        """
        codes, scale, kept = self.codes, self.scale, self._kernel_scales
        if _as_stored(codes):
            with torch.inference_mode(False):
                codes = integer_matmul.packed(codes)
            self.codes = codes
        if kept is None or kept[0] is not scale:
            kept = scale, integer_matmul.scales_and_zeros(scale)
            self._kernel_scales = kept
        return codes, kept[1]

    def restore(self) -> None:
        """Bring int4 codes back into the order in which they are stored, if a kernel has them in its own."""
        self._kernel_scales = None
        if not _as_stored(self.codes):
            self.codes = pack_int4(integer_matmul.unpacked(self.codes, *self.shape))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.restore()  # the order is that of one device
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not _as_stored(self.codes):
            destination[f"{prefix}codes"] = pack_int4(integer_matmul.unpacked(self.codes, *self.shape))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: the codes as they are stored."""
        state = self.__dict__ | {"_buffers": dict(self._buffers), "_kernel_scales": None}
        if not _as_stored(self.codes):
            state["_buffers"]["codes"] = pack_int4(integer_matmul.unpacked(self.codes, *self.shape))
        return state

    def extra_repr(self) -> str:
        """Describe the layer as `torch.nn.Linear` does, with its scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.scheme.name}, bias={self.bias is not None}"
        )


def _as_stored(codes: Tensor) -> bool:
    """Return whether the codes are in the order of the file, and not in that of an int4 kernel."""
    return codes.ndim == 2

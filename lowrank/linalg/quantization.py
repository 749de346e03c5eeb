"""Integer codes for weights: ``W ≈ scale · codes``, symmetric, by rows or by groups within a row.

``int8`` has one float32 scale per row. ``int4`` has one float16 scale per group of a row's neighbouring
elements, two codes to a byte, and its scales are searched: at 4 bits the best one clips a few elements.
The largest element of a group gets the code −8, whose sign the scale takes up, as in GGUF's Q4_0.

With the inputs' second moment C, columns are rounded one after another and those still to come make up
for the error, so that ``‖(W − scale · codes) C^½‖`` becomes small and not each element's own error. Source:
GPTQ (Frantar et al. 2022, arXiv:2210.17323), after Optimal Brain Surgeon (Hassibi & Stork 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import WeightError
from lowrank.linalg.matmul import product
from lowrank.linalg.schemes import Scheme, StorageScheme, register_storage_scheme
from lowrank.linalg.svd import FLOATING

DAMPING = 0.01
"""What is added to the diagonal of C before it is inverted, over its mean, as in GPTQ."""

_RATIOS = tuple(1.06 - 0.03 * step for step in range(11))
"""Scales to try under ``int4``, relative to the one that just represents the largest element."""


def quantize_weight(weight: Tensor, scheme: Scheme, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes and scales of ``weight (rows, columns)``, as `Scheme.tensors` says.

    Args:
        weight: Finite, floating point.
        scheme: How to store it.
        moments: ``C``, the second moment of what the weight multiplies, ``(columns, columns)``, of any
            rank; without it every element is rounded on its own.

    Raises:
        WeightError: If the weight is not floating point, has no data, is not finite, or (`SchemeError`) not
            whole groups.
    """
    if weight.dtype not in FLOATING:
        raise WeightError(f"the weight is {weight.dtype}, not floating point. Is it quantized already?")
    if weight.is_meta:
        raise WeightError("the weight is on the meta device and has no data. Load the weights first.")
    weight = weight.detach().to(torch.float32).contiguous()  # kernels read codes as they lie
    if not torch.isfinite(weight).all():
        raise WeightError("the weight has NaN or infinite elements.")
    scheme.check(*weight.shape)
    feedback = _feedback(moments) if moments is not None else None
    return scheme.storage.quantize(weight, scheme.group_size, feedback)


class Int8(StorageScheme):
    """The scheme int8: one float32 scale per row, symmetric, from −127 to 127.

    Layers round their inputs, too.
    """

    name = "int8"
    rounds_inputs = True
    kernel = "int8"

    def quantize(
        self, weight: Tensor, group_size: int | None, feedback: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return codes and scales of a float32 ``weight``."""
        scale = weight.abs().amax(1, keepdim=True) / 127
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)  # a row of zeros
        if feedback is not None:
            return _rounded_in_turn(weight, feedback, len(feedback), lambda _: (scale, 127)).codes, scale
        return (weight / scale).round_().to(torch.int8), scale

    def requantize(self, weight: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
        """Return the codes nearest to ``weight`` for given scales."""
        return (weight / scale).round_().clamp_(-127, 127).to(torch.int8)

    def are_possible_codes(self, codes: Tensor) -> bool:
        """Tell whether all codes are above −128, which the symmetric range leaves out."""
        return not (codes.numel() and int(codes.amin()) == -128)

    def are_possible_scales(self, scale: Tensor) -> bool:
        """Tell whether all scales are finite and positive."""
        return super().are_possible_scales(scale) and not bool((scale <= 0).any())


class Int4(StorageScheme):
    """The scheme int4: one float16 scale per group of a row's elements, which is searched.

    A byte holds two integers, from −8 to 7.
    """

    name = "int4"
    grouped = True
    kernel = "int4"
    per_element = 2
    codes_dtype = torch.uint8
    scale_dtype = torch.float16
    smallest, largest = 1e-5, 2e5  # what float16 scales hold, with room for what scales inputs

    def quantize(
        self, weight: Tensor, group_size: int | None, feedback: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return codes and scales of a float32 ``weight``."""
        assert group_size is not None  # `Scheme` gives one
        if feedback is not None:
            found = _rounded_in_turn(
                weight, feedback, group_size, lambda group: (_searched(group)[1][:, None], 7)
            )
            return pack_int4(found.codes), torch.cat(found.scales, 1)
        codes, scale = _searched(weight.reshape(len(weight), -1, group_size))
        return pack_int4(codes.flatten(1)), scale

    def requantize(self, weight: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
        """Return the codes nearest to ``weight`` for given scales."""
        groups = weight.reshape(*scale.shape, group_size or 1) / scale[..., None].to(weight.dtype)
        return pack_int4(groups.round_().clamp_(-8, 7).to(torch.int8).flatten(1))

    def integers(self, codes: Tensor) -> Tensor:
        """Return the integers, one element to a number."""
        return unpack_int4(codes)


register_storage_scheme(Int8())
register_storage_scheme(Int4())


def smooth_scale_of(weight: Tensor, variances: Tensor) -> Tensor:
    """Return by what to multiply the inputs, and divide the columns of ``weight (rows, columns)``.

    Half of the unevenness of the features goes into the weight, as in SmoothQuant (Xiao et al. 2022,
    arXiv:2211.10438): columns that meet large inputs get more of a group's steps. A feature that is constant
    stays as it is.

    Args:
        weight: What is to be quantized.
        variances: Of the features, ``(columns,)``.

    Returns:
        ``(columns,)``, positive, with a geometric mean of 1; float16, well within its range.
    """
    spread = variances.clamp(min=0).sqrt().to(weight.device)
    largest = weight.abs().amax(0).double()
    alive = (spread > 0) & (largest > 0)
    smooth_scale = torch.where(alive, (largest / torch.where(alive, spread, 1.0)).sqrt(), 1.0)
    if alive.any():
        smooth_scale = torch.where(alive, smooth_scale / smooth_scale[alive].log().mean().exp(), smooth_scale)
    return smooth_scale.clamp(1e-2, 1e2).to(torch.float16)


def quantize_scaled(
    weight: Tensor, scheme: Scheme, smooth_scale: Tensor | None = None, moments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes and scales of ``W diag(s)⁻¹``, which reads ``s·x``; ``moments`` are those of ``x``."""
    exact = weight.detach().float()
    if smooth_scale is None:
        return quantize_weight(exact, scheme, moments)
    scale = smooth_scale.to(torch.float64)
    return quantize_weight(
        exact / smooth_scale.float(),
        scheme,
        moments * scale[:, None] * scale if moments is not None else None,
    )


def dequantize_scaled(
    codes: Tensor, scale: Tensor, scheme: Scheme, smooth_scale: Tensor | None = None
) -> Tensor:
    """Return the weight ``(rows, columns)`` in float32 that `quantize_scaled` has quantized."""
    weight = dequantize_weight(codes, scale, scheme)
    return weight if smooth_scale is None else weight * smooth_scale


def requantize(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return the codes nearest to ``weight (rows, columns)`` for given scales, as `quantize_weight` does."""
    return scheme.storage.requantize(weight, scale, scheme.group_size)


def dequantize_weight(
    codes: Tensor, scale: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``scale · codes`` for any leading dimensions: ``(…, columns)``."""
    return scaled(scheme.storage.integers(codes), scheme.storage.scales(scale), dtype)


def scaled(integers: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``scale · integers``: ``(…, groups)`` and ``(…, columns)``, one element to a number."""
    size = integers.shape[-1] // scale.shape[-1]
    groups = integers.reshape(*scale.shape, size).to(torch.float32)
    return groups.mul_(scale[..., None].to(torch.float32)).flatten(-2).to(dtype)


class _Rounded(NamedTuple):
    codes: Tensor  # (rows, columns), int8
    scales: list[Tensor]  # of each group


def _feedback(moments: Tensor) -> Tensor:
    """Return the upper Cholesky factor of ``C⁻¹``, whose rows say how later columns make up for an error."""
    moments = moments.to(torch.float64)
    identity, trace = torch.eye(len(moments), dtype=moments.dtype, device=moments.device), moments.trace()
    if not trace > 0:  # nothing varies: there is no other column to make up for an error
        return identity.to(torch.float32)
    moments, ridge = moments * (len(moments) / trace), DAMPING
    factor, failed = torch.linalg.cholesky_ex(moments + ridge * identity)
    while failed:  # what is left of constants without their mean: rounding errors, of any sign
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(moments + ridge * identity)
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(torch.float32)


def _rounded_in_turn(
    weight: Tensor, feedback: Tensor, size: int, scale_of: Callable[[Tensor], tuple[Tensor, int]]
) -> _Rounded:
    """Round column after column; ``scale_of`` gives scale and largest code for each group of ``size``."""
    rest, codes, scales = weight.clone(), torch.empty_like(weight, dtype=torch.int8), []
    columns = weight.shape[1]
    for start in range(0, columns, size):
        scale, highest = scale_of(rest[:, start : start + size])
        scales.append(scale)
        exact, lowest = scale[:, 0].to(torch.float32), -highest - (highest == 7)
        for first in range(start, min(start + size, columns), 64):
            last = min(first + 64, start + size, columns)
            errors = torch.empty_like(rest[:, first:last])
            for column in range(first, last):
                code = (rest[:, column] / exact).round_().clamp_(lowest, highest)
                codes[:, column] = code.to(torch.int8)
                error = (rest[:, column] - code * exact) / feedback[column, column]
                rest[:, column:last] -= error[:, None] * feedback[column, column:last]
                errors[:, column - first] = error
            rest[:, last:] -= product(errors, feedback[first:last, last:])
    return _Rounded(codes, scales)


def _searched(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes in −8 … 7 and the scales, of those tried, that lose the least in each group."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_codes = torch.zeros_like(groups, dtype=torch.int8)
    best_scale = torch.ones_like(largest, dtype=torch.float16)
    least = groups.square().sum(-1, keepdim=True)  # of a group whose scale float16 cannot hold: zeros
    for ratio in _RATIOS:
        scale = (largest * (-ratio / 8)).to(torch.float16)
        usable = (scale != 0) & torch.isfinite(scale)
        exact = torch.where(usable, scale, 1.0).to(torch.float32)
        codes = (groups / exact).round_().clamp_(-8, 7)
        lost = (groups - codes * exact).square_().sum(-1, keepdim=True)
        better = usable & (lost < least)
        least = torch.where(better, lost, least)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes.to(torch.int8), best_codes)
    return best_codes, best_scale[..., 0]


def pack_int4(integers: Tensor) -> Tensor:
    """Put two codes of int4, −8 … 7, into a byte: the even columns into the low half."""
    nibbles = (integers + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(codes: Tensor) -> Tensor:
    """Return what `pack_int4` packed, as int8: ``(…, columns / 2)`` bytes become ``(…, columns)``."""
    return torch.stack(nibbles(codes), dim=-1).flatten(-2).to(torch.int8) - 8


def nibbles(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and the high four bits of bytes."""
    wide = codes.to(torch.int32)  # torch.onnx takes bytes for signed when they are shifted; // is slow
    return codes & 15, (wide >> 4).to(torch.uint8)

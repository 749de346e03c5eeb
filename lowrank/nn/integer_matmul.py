"""What multiplies integer weights without dequantizing them: PyTorch's kernels, and what they want around
them.

``int8``: rows of the input become integers, ``torch._int_mm`` multiplies them, and the sums are scaled back.
All but the product is elementwise and bound by memory, so it goes through the rows part by part;
`torch.compile` fuses it, with what comes before and after, better than parts do, and gets it whole.

``int4``: PyTorch's weight-only kernels read the codes in an order of their own, which depends on the device
and its instructions, so it is made where the codes are used and never stored. They take bfloat16 inputs,
sum in float32, and return bfloat16; scales are rounded to bfloat16, too. That costs a relative 0.003 of the
output. (In float32 the CPU's kernel is exact, and thirty times slower.)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank.linalg.matmul import is_compiled
from lowrank.linalg.quantization import nibbles, unpack_int4

PART = 2**20
"""Elements of the output that a CPU computes at a time, so that its integers stay in the cache."""

PART_OF_INPUT = 2**18
"""Elements of the input that a CPU quantizes at a time, for the same reason."""

ROUND = 1.5 * 2**23
"""A constant that, added to a float32 of less than 2²², leaves the nearest integer in the low bits;
that spares a pass."""

SMALLEST_STEP = 2.0**-126
"""The smallest step of a quantized input: the least float32 of full precision whose inverse is one, too."""

FEWEST_ON_CUDA = 2**32
"""The multiply-accumulates from which integers are faster on CUDA: quantizing inputs takes six kernels."""

FEWEST_INPUTS = 2
"""The fewest columns of a weight that integers multiply: for one, `torch._int_mm` returns other memory."""

MOST_ROWS = {"cpu": 128, "cuda": 64}
"""The number of rows up to which int4 kernels are faster than a product in floating point."""

GROUPS = (32, 64, 128, 256)
"""The group sizes that int4 kernels know."""


def prepared(input: Tensor, smooth_scale: Tensor | None, input_shift: Tensor | None) -> Tensor:
    """Return ``s·x − c``, in the dtype of the input."""
    if smooth_scale is None:
        return input
    if input_shift is None:
        return input * smooth_scale.to(input.dtype)
    return torch.addcmul(-input_shift.to(input.dtype), input, smooth_scale.to(input.dtype))


def quantized(rows: Tensor, smooth_scale: Tensor | None, input_shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return int8 codes of ``s·x − c`` for ``rows (n, in)``, and what one is worth in each row, ``(n, 1)``.

    The latter is NaN or infinite where the row is: the codes do not matter then.
    """
    if is_compiled():
        values = prepared(rows.to(torch.float32), smooth_scale, input_shift)
        step = (values.abs().amax(1, keepdim=True) / 127).clamp(min=SMALLEST_STEP)
        return (values * step.reciprocal()).round().to(torch.int8), step
    count, features = rows.shape
    codes, step = rows.new_empty(rows.shape, dtype=torch.int8), rows.new_empty(count, 1, dtype=torch.float32)
    some = _rows_at_a_time(rows, features, PART_OF_INPUT)
    space = rows.new_empty(min(some, count), features, dtype=torch.float32)
    shift = torch.full((features,), ROUND, dtype=torch.float32, device=rows.device)
    parts = (torch.split(tensor, some) for tensor in (rows, codes, step))
    for part, given, worth in zip(*parts, strict=True):
        values, room = prepared(part.to(torch.float32), smooth_scale, input_shift), space[: len(part)]
        torch.amax(torch.abs(values, out=room), 1, keepdim=True, out=worth)
        worth.div_(127).clamp_(min=SMALLEST_STEP)
        torch.addcmul(shift, values, worth.reciprocal(), out=room)
        given.copy_(room.view(torch.int32))  # the lowest byte
    return codes, step


def integer_product(given: Tensor, step: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``step · given · codesᵀ · scale + b`` in float32, ``(n, out)``.

    The rows, ``given`` and ``step``, are from `quantized`; the weight is ``codes (out, in)``, int8, with
    ``scale (out, 1)``, and ``bias (out,)`` in float32.
    """
    count, features = len(given), len(codes)
    missing = max(0, 17 - count) if given.is_cuda else 0  # CUDA's kernel wants more than 16 rows
    given = pad(given, (0, 0, 0, missing)) if missing else given
    if is_compiled():
        output = torch._int_mm(given, codes.T)[:count] * scale[:, 0] * step
        return output if bias is None else output + bias
    output = step.new_empty(count, features)
    some = _rows_at_a_time(given, features, PART)
    sums = torch.empty(min(some, len(given)), features, dtype=torch.int32, device=given.device)
    right, scale = codes.T, scale[:, 0]
    parts = (torch.split(tensor, some) for tensor in (given, output, step))
    for left, part, worth in zip(*parts, strict=True):
        part.copy_(torch._int_mm(left, right, out=sums[: len(left)])[: len(part)])
        part.mul_(scale)  # in two steps: on a CPU, operations on two dtypes are slow
        if bias is None:
            part.mul_(worth)
        else:
            torch.addcmul(bias, part, worth, out=part)
    return output


def _rows_at_a_time(tensor: Tensor, features: int, elements: int) -> int:
    return max(1, elements // features) if tensor.device.type == "cpu" else max(1, len(tensor))


def fewest_integer_rows(rows: int, columns: int, device: torch.device) -> int | None:
    """Return from how many rows of the input on integers multiply a weight ``(rows, columns)``; or never."""
    if columns < FEWEST_INPUTS:
        return None
    if device.type == "cuda" and rows % 8 == columns % 8 == 0:
        return max(1, -(-FEWEST_ON_CUDA // (rows * columns)))
    return 1 if device.type == "cpu" and INTEGERS else None


def why_no_int4_kernel(rows: int, columns: int, group_size: int, device: torch.device) -> str | None:
    """Say why no kernel multiplies by an int4 weight ``(rows, columns)``; ``None`` if one does."""
    if device.type not in MOST_ROWS:
        return f"PyTorch has no int4 kernel for {device.type!r} devices that lowrank knows"
    multiple = 16 if device.type == "cpu" else 8
    if rows % multiple:
        return f"the kernel wants outputs in multiples of {multiple}"
    if group_size not in GROUPS or columns % group_size:
        return f"the kernel knows groups of {', '.join(map(str, GROUPS))}, not of {group_size}"
    if not _int4_works(str(device)):
        return f"this {device.type.upper()} is none of those that the kernel is made for"
    return None


def packed(codes: Tensor) -> Tensor:
    """Return int4 codes ``(out, in / 2)`` in the order of the device's kernel: the same bytes, no matrix."""
    if not codes.is_cuda:
        integers = unpack_int4(codes).to(torch.int32) + 8
        return torch._convert_weight_to_int4pack_for_cpu(integers, 1).flatten()
    swapped = (codes >> 4) | (codes << 4)  # there even columns are the high halves
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (8 * tiles) == 0)
    return torch._convert_weight_to_int4pack(swapped.contiguous(), tiles)


def unpacked(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Return the integers −8 … 7 that `packed` put in order, int8 ``(rows, columns)``."""
    nibbles = _from_cuda(codes) if codes.ndim == 4 else _from_cpu(codes, columns)
    return nibbles.reshape(rows, columns).to(torch.int8) - 8


def _from_cpu(codes: Tensor, columns: int) -> Tensor:
    """Blocks of rows: each byte holds one column of two rows that are half a block apart.

    In the rest, that is no whole block, they are neighbours.
    """
    whole = len(codes) * 2 // columns // _BLOCK * _BLOCK
    blocks = codes[: whole * columns // 2].view(-1, columns, _BLOCK // 2)
    top = torch.stack(nibbles(blocks), 1).transpose(2, 3).reshape(whole, columns)
    rest = codes[whole * columns // 2 :].view(columns, -1)
    return torch.cat([top, torch.stack(nibbles(rest), -1).flatten(1).T])


def _from_cuda(codes: Tensor) -> Tensor:
    """Tiles of 8 rows and pairs of 16 columns, as tensor cores want them: ``(tile, outer, lane, pair)``.

    Lanes are 8 rows by 4 columns of bytes. A word holds four such bytes that are four columns apart: of
    their even columns in its low half, of their odd ones in its high half.
    """
    tiles, outer, _, pairs = codes.shape
    words = codes.contiguous().view(torch.uint8).view(tiles, outer, 8, 4, pairs, 4)
    even, odd = (torch.stack(nibbles(half), -1).flatten(-2) for half in (words[..., :2], words[..., 2:]))
    bytes_ = torch.stack([even, odd], -1)  # (tile, outer, row, column, pair, apart, even or odd)
    return bytes_.permute(0, 2, 1, 4, 5, 3, 6)


def scales_and_zeros(scale: Tensor) -> Tensor:
    """Return int4 scales ``(out, groups)`` as kernels read them: ``(groups, out, 2)``, the second zero."""
    turned = scale.T.to(torch.bfloat16)
    return torch.stack([turned, torch.zeros_like(turned)], -1)


def int4_product(rows: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return ``rows · (scale · codes)ᵀ`` in bfloat16, ``(n, out)``.

    Args:
        rows: ``(n, in)`` in any floating dtype.
        codes: From `packed`, on this device.
        scales: From `scales_and_zeros`.
        group_size: Elements that share a scale.
    """
    given = rows.to(torch.bfloat16).contiguous()
    if given.is_cuda:
        return torch._weight_int4pack_mm(given, codes, group_size, scales)
    return torch._weight_int4pack_mm_for_cpu(given, codes.view(scales.shape[1], -1), group_size, scales)


@torch.library.custom_op(
    "lowrank::int4_product",
    mutates_args=(),
    schema="(Tensor rows, Tensor codes, Tensor scales, int group_size) -> Tensor",
)
def int4_product_unseen(rows: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Multiply as `int4_product` does, in compiled graphs.

    There the kernel could meet rows that are not contiguous.
    """
    return int4_product(rows, codes, scales, group_size)


@int4_product_unseen.register_fake
def _(rows: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    return rows.new_empty(rows.shape[0], scales.shape[1], dtype=torch.bfloat16)


@functools.cache
def _int4_works(device: str) -> bool:
    """Return whether the device has the kernel, and both the order of its codes and its result are known."""
    generator = torch.Generator().manual_seed(0)
    for columns in (32, 64, 128):
        codes = torch.randint(256, (112, columns // 2), generator=generator, dtype=torch.uint8).to(device)
        weight = unpack_int4(codes)
        try:
            there = packed(codes)
            scales = scales_and_zeros(torch.ones(112, columns // 32, device=device))
            found = int4_product(torch.eye(columns, device=device), there, scales, 32)
        except (RuntimeError, AttributeError):  # no such operator, or not for this processor
            return False
        if not torch.equal(unpacked(there, 112, columns), weight) or not torch.equal(
            found.T, weight.to(found)
        ):
            return False
    return not device.startswith("cpu") or _CAPABILITY.startswith("AVX")


def _has_integers() -> bool:
    """Return whether this processor has the instructions; without VNNI, sums can saturate."""
    return torch._C._has_mkldnn and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


INTEGERS = _has_integers()
"""Whether this processor multiplies integers exactly."""

_CAPABILITY = torch.backends.cpu.get_cpu_capability()
_BLOCK = 64 if _CAPABILITY.startswith("AVX512") else 32  # rows

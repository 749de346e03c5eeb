"""Matrix products in float32 on a CPU, by whichever of PyTorch's two libraries is faster.

PyTorch hands float32 products to MKL, which on processors not made by Intel leaves out AVX-512.
oneDNN, which PyTorch ships too, does not: twice as fast on the AMD EPYC that the figures in
`benchmarks/results` are from, with the same rounding error. Its operator knows neither derivatives
(here they are), nor batching, nor tracing: whatever transforms, traces or watches PyTorch's own
operators gets these. `torch.compile` calls it, as an operator that it does not look into.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.autograd import forward_ad

FEWEST_ROWS = 16
"""The number of rows from which oneDNN is faster than MKL; it takes longer to start."""


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Multiply in the dtypes that tensors have, also where the user's `torch.autocast` would take another.

    What a model computes is its user's to decide; weights and statistics are not.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def row_major(matrix: Tensor) -> Tensor:
    """Return a contiguous matrix with the strides of one that is made anew, and any other as it is.

    A matrix with a single row or column may have any stride there. Kernels choose their way by the strides,
    and round otherwise, so a model and its reloaded copy would differ in the last bit.
    """
    return matrix.view(-1).view(matrix.shape) if matrix.is_contiguous() else matrix


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + b``, as `torch.nn.functional.linear`; ``x (…, in)``, ``W (out, in)``, ``b (out,)``."""
    if not _faster_by_onednn(input, weight, bias):
        return torch.nn.functional.linear(input, weight, bias)
    if _trained(input, weight, bias):
        return _Differentiable.apply(input, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return linear_unseen(input, weight, bias) if is_compiled() else _by_onednn(input, weight, bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` for two matrices, ``(m, k)`` and ``(k, n)``."""
    return linear(left, right.T)


class _Differentiable(torch.autograd.Function):
    """The product with its derivatives, which are products too; so there are derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        output = _by_onednn(input, weight, bias)
        # Not as a view of what oneDNN returned: autograd lets nobody change such an output in place.
        return torch.ops.aten._unsafe_view(output, output.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            linear(gradient, weight.T) if needs_input else None,
            product(rows.T, input.reshape(-1, input.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return result


@torch.library.custom_op(
    "lowrank::linear", mutates_args=(), schema="(Tensor input, Tensor weight, Tensor? bias) -> Tensor"
)
def linear_unseen(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply as `_by_onednn` does, in compiled graphs.

    The compiler would take oneDNN's operator for one of its own, of packed weights.
    """
    return _by_onednn(input, weight, bias)


@linear_unseen.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _faster_by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return bool(
        AVAILABLE
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and type(input) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.ndim == 2
        and input.shape[-1:] == weight.shape[1:]
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and not (_trained(input, weight, bias) if is_compiled() else is_observed())
        and not torch.is_autocast_enabled("cpu")
        and input.numel() >= FEWEST_ROWS * input.shape[-1] > 0
        and weight.numel() > 0
        and _packed(input)
        and _packed(weight)
        and torch.backends.mkldnn.enabled
    )


def _packed(tensor: Tensor) -> bool:
    """Return whether the tensor lies without gaps, by rows or by columns; on others oneDNN is very slow."""
    return tensor.is_contiguous() or (tensor.ndim == 2 and tensor.T.is_contiguous())


def _trained(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_observed() -> bool:
    """Return whether something other than plain eager execution will see the operators."""
    if is_transformed():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0


def is_transformed() -> bool:
    """Return whether the operators are compiled, traced, batched or differentiated from outside."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or _is_inside_a_function_transform()


def is_compiled() -> bool:
    """Return whether `torch.compile` makes a graph that runs here: it is not exported, nor transformed."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and not _is_inside_a_function_transform()


def _is_inside_a_function_transform() -> bool:
    """Return whether `torch.func` or forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0 or _functorch_is_at_work()


def _functorch_is_at_work() -> bool:
    """Tell so to a compiler, too, which has the transforms that it traces on the same stack."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# As `torch.compiler.assume_constant_result` does, which imports the compiler: that takes a second.
vars(_functorch_is_at_work)["_dynamo_marked_constant"] = True


def _available() -> bool:
    """Return whether the operator is there and this processor has what makes it faster."""
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return capable and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


AVAILABLE = _available()
"""Whether oneDNN's product is there, and faster than PyTorch's own."""

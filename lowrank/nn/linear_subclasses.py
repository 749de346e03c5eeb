"""Which subclasses of `torch.nn.Linear` compute what it computes, as transformers' ``FalconLinear`` does.

Such a class has a ``forward`` of its own at most, whose source consists of additions and products of the
input, the weight and the bias, and nothing else: no number, no other attribute, no branch but on whether
there is a bias. What it returns is then a polynomial in these three, and two polynomials that agree at a
random point are the same one. So a small layer of the class is tried once.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HARMLESS = {"forward", "extra_repr", "reset_parameters", "__repr__"}
"""What a class may define: none of it has a part in what the layer returns, but for ``forward``."""

_OF_TORCH = nn.Linear, nn.Module, object
_ATTRIBUTES = {"weight", "bias", "T", "mT", "t", "matmul", "linear", "forward", "functional", "nn"}
_GLOBALS = (torch, nn, functional, functional.linear, torch.matmul)
_NODES = (
    *(ast.Return, ast.Assign, ast.If, ast.IfExp, ast.Name, ast.Load, ast.Store, ast.Attribute, ast.Call),
    *(ast.keyword, ast.BinOp, ast.Add, ast.MatMult, ast.Compare, ast.Is, ast.IsNot, ast.Constant),
)


@cache
def computes_the_same(cls: type[nn.Module]) -> bool:
    """Tell whether layers of ``cls`` are certain to compute what `torch.nn.Linear` does."""
    if not issubclass(cls, nn.Linear):
        return False
    own = {name: value for base in cls.__mro__ if base not in _OF_TORCH for name, value in vars(base).items()}
    defined = {name for name, value in own.items() if inspect.isroutine(value) or not name.startswith("__")}
    if not defined <= HARMLESS:
        return False
    forward = cls.forward
    return forward is nn.Linear.forward or (_is_affine(forward) and _agrees(cls))


def build(cls: type[nn.Module], in_features: int, out_features: int, bias: bool, **where: Any) -> nn.Module:
    """Make a layer of a subclass of `torch.nn.Linear` from its sizes, without its own initialisation."""
    layer = cls.__new__(cls)
    nn.Linear.__init__(layer, in_features, out_features, bias, **where)  # type: ignore[arg-type]
    return layer


def _is_affine(forward: FunctionType | Any) -> bool:
    """Tell whether the source of a method has only what a polynomial in input, weight and bias needs."""
    code = getattr(forward, "__code__", None)
    if code is None or len(inspect.signature(forward).parameters) != 2:
        return False
    known = {name for name, value in forward.__globals__.items() if any(value is one for one in _GLOBALS)}
    if not set(code.co_names) <= _ATTRIBUTES | known | {"super"}:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, SyntaxError):
        return False
    local = {*code.co_varnames, *known, "super"}
    return isinstance(tree, ast.FunctionDef) and all(
        _is_allowed(node, local) for part in tree.body for node in ast.walk(part) if not _is_text(part)
    )


def _is_allowed(node: ast.AST, local: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in local
    if isinstance(node, ast.Attribute):
        return node.attr in _ATTRIBUTES and isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Constant):
        return node.value is None
    return isinstance(node, _NODES)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _agrees(cls: type[nn.Module]) -> bool:
    """Compare a small layer with `torch.nn.functional.linear`, with and without bias, on random numbers."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    weight, bias = nn.Parameter(random(5, 3)), nn.Parameter(random(5))
    for used in (bias, None):
        layer = build(cls, 3, 5, used is not None, device="meta")
        layer.weight = weight
        layer.register_parameter("bias", used)
        for shape in ((3,), (4, 3), (2, 4, 3)):
            x = random(*shape)
            try:
                with torch.no_grad():
                    found, expected = cls.forward(layer, x), functional.linear(x, weight, used)
            except Exception:  # whatever a foreign method raises: it is not nn.Linear's
                return False
            if not isinstance(found, Tensor) or found.shape != expected.shape:
                return False
            if not torch.allclose(found, expected, rtol=1e-12, atol=1e-12):
                return False
    return True

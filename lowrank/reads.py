"""Which weights the methods of a class read by value: ``self.proj.weight``, without calling the layer.

Nothing is run and no model is listed. A method's bytecode tells whether it reads a ``.weight`` at all, its
source tells whose. Where the source is missing, everything that the method names is suspected, and
what is directly below it.

A read is a **chain** of names on the way down from the module to its layer: ``("attn", "out")`` for
``self.attn.out.weight``, and ``("layers", ANY)`` for any child of ``self.layers``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache, cached_property
from itertools import product
from tokenize import TokenError
from types import CodeType
from typing import Any

from torch import nn

Chain = tuple[str, ...]

ANY = "*"
LOOKS = ("dtype", "device")
"""Attributes of a weight that a factorized layer's empty ``weight`` answers as the dense one does."""
VIEWS = ("children", "named_children", "values", "items")
"""Methods of a container whose result holds the container's children."""


@cache
def weights_read(cls: type[nn.Module]) -> frozenset[Chain]:
    """Return the chains to the layers whose ``.weight`` the methods of ``cls`` read, inherited ones too."""
    found: set[Chain] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, member in vars(base).items():
            code = _code_of(member)
            if code is not None and "init" not in name:  # initialising a weight is not computing with it
                found |= _reads_of(code)
    return frozenset(found)


def layers_read(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what stands below ``module`` where the chains of its class lead, layer or not."""
    for chain in weights_read(type(module)):  # type: ignore[arg-type]
        ends = [module]
        for part in chain:
            ends = [child for end in ends for name, child in end.named_children() if part in (name, ANY)]
        yield from ends


def _code_of(member: object) -> CodeType | None:
    """Return the bytecode of a method, also behind decorators and of a property."""
    function: Any = member
    if isinstance(member, property):
        function = member.fget
    elif isinstance(member, cached_property):
        function = member.func
    return getattr(inspect.unwrap(function), "__code__", None)


def _reads_of(code: CodeType) -> set[Chain]:
    names = _names(code)
    if "weight" not in names:
        return set()
    tree = _tree(code)
    if tree is None:
        return {(one, *other) for one, other in product(names, [(), (ANY,), *((name,) for name in names)])}
    scan = _Scan(code.co_varnames[: code.co_argcount][:1])
    scan.visit(tree)  # binds every name, also those that a loop uses above their binding
    scan.visit(tree)
    return scan.reads


def _tree(code: CodeType) -> ast.AST | None:
    """Parse the source of a function; ``None`` if it is missing, or was edited since it was imported."""
    try:
        source = inspect.getsource(code)
        indented = source[:1].isspace()
        return ast.parse("if True:\n" + source if indented else source) if "weight" in source else None
    except (OSError, SyntaxError, TokenError):
        return None


def _names(code: CodeType) -> set[str]:
    """Name the attributes and the texts in a function and in those inside it; ``getattr`` takes a text."""
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return texts.union(code.co_names, *inner)


class _Scan(ast.NodeVisitor):
    """Follow names through a method, order and branches aside, and collect the chains before ``.weight``."""

    def __init__(self, first: Chain) -> None:
        self.chains: dict[str, set[Chain]] = {name: {()} for name in first}  # usually ``self``
        self.reads: set[Chain] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in LOOKS and isinstance(node.value, ast.Attribute) and node.value.attr == "weight":
            return
        if node.attr == "weight" and isinstance(node.ctx, ast.Load):
            self.reads |= self._lead_to(node.value) - {()}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        owner, name = _getattr(node)
        if owner is not None and name == "weight":
            self.reads |= self._lead_to(owner) - {()}
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    visit_AsyncFor = visit_comprehension = visit_For  # noqa: N815

    def visit_NamedExpr(self, node: ast.NamedExpr | ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, node.value)
        self.generic_visit(node)

    visit_AnnAssign = visit_NamedExpr  # noqa: N815

    def _bind(self, target: ast.AST, value: ast.AST) -> None:
        """Let each name in ``target`` stand for what is in ``value``, and for each child of that."""
        found = self._lead_to(value)
        chains = found | {(*chain, ANY) for chain in found}
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.chains[node.id] = self.chains.get(node.id, set()) | chains

    def _lead_to(self, node: ast.AST) -> set[Chain]:
        """Return the chains to the modules that an expression may be, or hold."""
        if isinstance(node, ast.Name):
            return self.chains.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return self._below(node.value, node.attr)
        if isinstance(node, ast.Subscript):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else ANY
            return self._below(node.value, str(index))
        if isinstance(node, ast.Call):
            return self._lead_to_result(node)
        return set().union(*map(self._lead_to, ast.iter_child_nodes(node)))

    def _lead_to_result(self, node: ast.Call) -> set[Chain]:
        """Follow ``getattr`` and views of containers; other calls (``enumerate``) may return an argument."""
        owner, name = _getattr(node)
        if owner is not None:
            return self._below(owner, name)
        if isinstance(node.func, ast.Attribute) and node.func.attr in VIEWS:
            return self._lead_to(node.func.value)
        return set().union(*map(self._lead_to, node.args))

    def _below(self, owner: ast.AST, name: str) -> set[Chain]:
        return {(*chain, name) for chain in self._lead_to(owner)}


def _getattr(node: ast.Call) -> tuple[ast.AST | None, str]:
    """Return what ``getattr(owner, name)`` reads, with `ANY` for a name that is computed."""
    if not (isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1):
        return None, ""
    owner, name = node.args[:2]
    return owner, str(name.value) if isinstance(name, ast.Constant) else ANY

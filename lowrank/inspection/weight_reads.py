"""Which weights the methods of a class read by value: ``self.proj.weight``, without calling the layer.

Nothing is run and no model is listed. A method's bytecode tells whether it reads a ``.weight`` at all, its
source tells whose. Where the source is missing, everything that the method names is suspected, and
what is directly below it.

A read has a **chain** of names on the way down from the module to its layer: ``("attn", "out")`` for
``self.attn.out.weight``, and ``("layers", ANY)`` for any child of ``self.layers``; and it has the conditions
of the branches that it stands in. A class is looked through once; the conditions are asked of each module.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator
from functools import cache
from itertools import product
from tokenize import TokenError
from types import CodeType
from typing import NamedTuple

from torch import nn

from lowrank.inspection.dead_branches import Guard, is_closed, methods_of

Chain = tuple[str, ...]

ANY = "*"
LOOKS = ("dtype", "device")
"""Attributes of a weight that a factorized layer's empty ``weight`` has as the dense one does; it is a
tensor, too, and not ``None``."""
VIEWS = ("children", "named_children", "values", "items")
"""Methods of a container whose result holds the container's children."""


class Read(NamedTuple):
    """Where a method reads ``.weight``: the chain to its layer, and what must hold for the read to happen."""

    chain: Chain
    guards: tuple[Guard, ...] = ()


@cache
def weights_read(cls: type[nn.Module]) -> frozenset[Read]:
    """Return the reads of a layer's ``.weight`` in the methods of ``cls``, inherited ones too."""
    return frozenset().union(*map(_reads_of, methods_of(cls)))


def layers_read(module: nn.Module, changing: Collection[str]) -> Iterator[nn.Module]:
    """Yield what stands below ``module`` where the reads of its class lead, layer or not.

    Args:
        module: Also has the constants that decide which branches are never taken.
        changing: Attributes that are no constants, from `names_set` of all classes in the model.
    """
    cls: type = type(module)
    for read in weights_read(cls):
        if is_closed(read.guards, module, changing):
            continue
        ends = [module]
        for part in read.chain:
            ends = [child for end in ends for name, child in end.named_children() if part in (name, ANY)]
        yield from ends


def _reads_of(code: CodeType) -> frozenset[Read]:
    names = _names(code)
    if "weight" not in names:
        return frozenset()
    tree = _tree(code)
    if tree is None:
        below = [(), (ANY,), *((name,) for name in names)]
        return frozenset(Read((one, *other)) for one, other in product(names, below))
    scan = _Scan(code.co_varnames[: code.co_argcount][:1], tree)
    scan.visit(tree)  # binds every name, also those that a loop uses above their binding
    scan.visit(tree)
    return frozenset(scan.reads)


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
    """Follow names through a method, whatever their order, and collect what is read as ``.weight``."""

    def __init__(self, first: Chain, tree: ast.AST) -> None:
        self.chains: dict[str, set[Chain]] = {name: {()} for name in first}  # usually ``self``
        self.reads: set[Read] = set()
        bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not _is_read(node)}
        self._module = next((name for name in first if name not in bound), None)
        self._guards: tuple[Guard, ...] = ()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        looks = node.attr in LOOKS and _is_weight(node.value)
        if _is_weight(node) and _is_read(node):
            self._read(node.value)
        self.generic_visit(node.value if looks else node)

    def visit_Call(self, node: ast.Call) -> None:
        owner, name = _getattr(node)
        if owner is not None and name == "weight":
            self._read(owner)
        self.generic_visit(node.args[0] if _asks_for_a_tensor(node) else node)

    def visit_Compare(self, node: ast.Compare) -> None:
        signs, (other, *more) = node.ops, node.comparators
        is_none = isinstance(signs[0], (ast.Is, ast.IsNot)) and isinstance(other, ast.Constant) and not more
        self.generic_visit(node.left if is_none and _is_weight(node.left) else node)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            before = self._guards
            if self._module is not None:
                self._guards = (*before, Guard(node.test, wanted, self._module))
            for part in branch if isinstance(branch, list) else [branch]:
                self.visit(part)
            self._guards = before

    visit_IfExp = visit_If  # noqa: N815

    def _read(self, layer: ast.AST) -> None:
        self.reads |= {Read(chain, self._guards) for chain in self._lead_to(layer) if chain}

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


def _is_weight(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight"


def _asks_for_a_tensor(node: ast.Call) -> bool:
    """Tell whether a call is ``isinstance(layer.weight, Tensor)``; the empty ``weight`` is one, too."""
    if not (isinstance(node.func, ast.Name) and node.func.id == "isinstance" and len(node.args) == 2):
        return False
    weight, kind = node.args
    return _is_weight(weight) and getattr(kind, "attr", getattr(kind, "id", "")) == "Tensor"


def _is_read(node: ast.Name | ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Load)


def _getattr(node: ast.Call) -> tuple[ast.AST | None, str]:
    """Return what ``getattr(owner, name)`` reads, with `ANY` for a name that is computed."""
    if not (isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1):
        return None, ""
    owner, name = node.args[:2]
    return owner, str(name.value) if isinstance(name, ast.Constant) else ANY

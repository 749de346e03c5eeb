"""Which branches of a method can never run: those whose condition constants of the module settle.

``if self.pretraining_tp > 1 and self.slow_but_exact`` is such a condition: both are numbers that the module,
or its config, was made with. Nothing is run for that: no property, no method, no comparison of other objects
than numbers and texts. What is not certain is left open.
"""

from __future__ import annotations

import ast
import dis
import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from functools import cache, cached_property
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class Guard(NamedTuple):
    """A condition that stands before a branch.

    Args:
        test: Its source.
        wanted: What it must be for the branch to run.
        module: The name that the method has for its module, usually ``self``.
    """

    test: ast.expr
    wanted: bool
    module: str


class _Open(Exception):  # noqa: N818
    """A value is not certain."""


def is_closed(guards: Collection[Guard], module: nn.Module, changing: Collection[str]) -> bool:
    """Tell whether a branch behind ``guards`` can never run in ``module``.

    Args:
        guards: Its conditions, all of which must hold.
        module: Has the constants.
        changing: Names of attributes that are set after modules are made (`names_set`): no constants.
    """
    return any(_is_settled_against(guard, module, changing) for guard in guards)


def _is_settled_against(guard: Guard, module: nn.Module, changing: Collection[str]) -> bool:
    try:
        return _truth(guard.test, guard.module, module, changing) is not guard.wanted
    except _Open:
        return False


def _truth(node: ast.expr, name: str, module: nn.Module, changing: Collection[str]) -> bool:
    """Return what a condition comes to; raises `_Open` where that is not certain."""
    if isinstance(node, ast.BoolOp):
        decisive, settled = isinstance(node.op, ast.Or), True
        for part in node.values:
            try:
                if _truth(part, name, module, changing) is decisive:
                    return decisive
            except _Open:
                settled = False
        if not settled:
            raise _Open
        return not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _truth(node.operand, name, module, changing)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        left, right = (_value(part, name, module, changing) for part in (node.left, node.comparators[0]))
        try:
            return bool(_COMPARISONS[type(node.ops[0])](left, right))
        except TypeError as error:
            raise _Open from error
    return bool(_value(node, name, module, changing))


def _value(node: ast.expr, name: str, module: nn.Module, changing: Collection[str]) -> object:
    """Return a constant, or what the module or an object in it has as a plain number or text."""
    found: object = node.value if isinstance(node, ast.Constant) else None
    if not isinstance(node, ast.Constant):
        found = module
        for part in _path(node, name):
            static = inspect.getattr_static(type(found), part, None)
            if (
                part in changing
                or inspect.isdatadescriptor(static)
                or part not in getattr(found, "__dict__", ())
            ):
                raise _Open
            found = vars(found)[part]
    if type(found) not in (bool, int, float, str, type(None)):
        raise _Open
    return found


def _path(node: ast.expr, name: str) -> list[str]:
    """Return the attributes from the module down to what ``self.config.size`` names."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    if not path or not isinstance(node, ast.Name) or node.id != name:
        raise _Open
    return path


@cache
def names_set(cls: type[nn.Module]) -> frozenset[str]:
    """Return the attributes that methods of ``cls`` set, of whatever object, those that initialise aside."""
    return frozenset({"training"}.union(*map(_names_stored, methods_of(cls))))  # which `Module.train` sets


def _names_stored(code: CodeType) -> set[str]:
    inner = (_names_stored(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    steps = dis.get_instructions(code)
    return {step.argval for step in steps if step.opname in ("STORE_ATTR", "DELETE_ATTR")}.union(*inner)


def methods_of(cls: type[nn.Module]) -> Iterator[CodeType]:
    """Yield the bytecode of the methods of ``cls``, inherited and overridden ones and properties too.

    Those that initialise are left out (``__init__``, ``_init_weights``): they run before the model computes.
    """
    for base in cls.__mro__:
        if base not in (nn.Module, object):
            for name, member in vars(base).items():
                code = _code_of(member)
                if code is not None and not _initialises(name):
                    yield code


def _initialises(name: str) -> bool:
    stem = name.strip("_")
    return stem == "init" or stem.startswith(("init_", "initialise", "initialize"))


def _code_of(member: object) -> CodeType | None:
    """Return the bytecode of a method, also behind decorators and of a property."""
    function: Any = member
    if isinstance(member, property):
        function = member.fget
    elif isinstance(member, cached_property):
        function = member.func
    return getattr(inspect.unwrap(function), "__code__", None)

"""The direction of imports, read from the source: data flows down one list of rooms, and never back."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank

ROOT = Path(lowrank.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
AT_THE_DOOR = [ROOT / "__init__.py", ROOT / "__main__.py"]
REPLACEMENT = ROOT / "surgery" / "replacement.py"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the full names that the code imports, function-local and type-only imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_by(path: Path) -> set[str]:
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    return set(imports(tree_of(path), package))


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "lowrank"}


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_reader_sees_absolute_relative_and_local_imports():
    code = "import a.b\nfrom .c import d\nfrom .. import e\ndef f():\n    from lowrank.g import h"
    found = set(imports(ast.parse(code), "lowrank.linalg"))
    assert found == {"a.b", "lowrank.linalg.c.d", "lowrank.e", "lowrank.g.h"}


ROOMS = [
    "errors",
    "arguments",
    "_transformers",
    "files",
    "linalg",
    "config",
    "plans",
    "nn",
    "inspection",
    "adapter",
    "calibration",
    "surgery",
    "allocation",
    "distillation",
    "reports",
    "checkpoint",
    "pipeline",
    "hf",
    "demo",
    "cli",
]
"""Every package and file at the top of the library: one imports only from those that stand above it here.

Imports inside functions, and those for type checkers only, count as well.
"""


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_the_list_names_every_room_and_no_other():
    there = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert there - {"__init__", "__main__"} == set(ROOMS)


def test_few_files_stand_outside_of_the_packages():
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 8


@pytest.mark.parametrize("path", [p for p in FILES if p not in AT_THE_DOOR], ids=ids)
def test_a_file_imports_only_from_rooms_above_its_own(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    others = {room_of(name) for name in own(imported_by(path)) if "." in name} & set(ROOMS) - {room}
    assert {name for name in others if ROOMS.index(name) >= ROOMS.index(room)} == set()


@pytest.mark.parametrize("package", [p for p in ROOMS if (ROOT / p).is_dir()])
def test_the_files_of_a_package_do_not_import_each_other_in_a_circle(package):
    files = {module_name(path): path for path in (ROOT / package).rglob("*.py")}
    uses = {
        name: {other for other in files if other != name and under_any(other, imported_by(path))}
        for name, path in files.items()
        if path.name != "__init__.py"
    }
    while free := [name for name, used in uses.items() if not used & uses.keys()]:
        for name in free:
            del uses[name]
    assert uses == {}


def under_any(module: str, names: set[str]) -> bool:
    return any(under(name, module) for name in names)


def swaps(tree: ast.AST) -> list[int]:
    """Lines that put a module into another one by hand."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            lines += [t.lineno for t in targets if isinstance(t, ast.Subscript) and "_modules" in ast.dump(t)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, holder = node.func.attr, ast.dump(node.func.value)
            if name in ("add_module", "register_module", "set_submodule") or (
                name in ("update", "pop", "setdefault", "__setitem__") and "_modules" in holder
            ):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", [p for p in FILES if p != REPLACEMENT], ids=ids)
def test_only_one_file_replaces_modules(path):
    assert swaps(tree_of(path)) == []


def test_the_detector_of_swaps_sees_the_one_that_there_is():
    assert len(swaps(tree_of(REPLACEMENT))) == 1


def at_import_time(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions and of ``if TYPE_CHECKING:``."""

    class Outer(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Outer().visit(tree)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "hf"], ids=ids)
def test_only_the_plug_in_imports_transformers(path):
    tree = tree_of(path)
    if under(module_name(path), "lowrank.cli", "lowrank.demo"):  # they load models, but only when run
        tree = at_import_time(tree)
    assert not [name for name in imports(tree, "lowrank") if under(name, "transformers")]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "hf"], ids=ids)
def test_only_the_plug_in_imports_itself_when_the_library_loads(path):
    names = set(imports(at_import_time(tree_of(path)), "lowrank"))
    assert not [name for name in names if under(name, "lowrank.hf")]


@pytest.mark.parametrize(
    "statement", ["import lowrank", "from lowrank import *"], ids=["import", "star-less-names"]
)
def test_importing_the_library_does_not_load_the_heavy_packages(statement):
    if "*" in statement:  # every public name but the one that needs transformers
        names = [name for name in lowrank.__all__ if name != "LowRankConfig"]
        statement = f"from lowrank import {', '.join(names)}"
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}}, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "typer", "matplotlib", "rich", "accelerate", "peft", "torch._dynamo"}

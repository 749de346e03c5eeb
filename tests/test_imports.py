"""The direction of imports, read from the source: low-level rooms do not know the high-level ones."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank

ROOT = Path(lowrank.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


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


@pytest.mark.parametrize("path", sorted((ROOT / "linalg").glob("*.py")), ids=ids)
def test_linalg_knows_only_errors_and_itself(path):
    assert all(under(name, "lowrank.errors", "lowrank.linalg") for name in own(imported_by(path)))


@pytest.mark.parametrize("path", sorted((ROOT / "nn").glob("*.py")), ids=ids)
def test_nn_knows_only_arguments_errors_linalg_and_itself(path):
    allowed = ("lowrank.arguments", "lowrank.errors", "lowrank.linalg", "lowrank.nn")
    assert all(under(name, *allowed) for name in own(imported_by(path)))


def test_planning_knows_only_plain_data():
    assert {name.rpartition(".")[0] for name in own(imported_by(ROOT / "planning.py"))} == {
        "lowrank.arguments",
        "lowrank.atomicfile",
        "lowrank.errors",
        "lowrank.jsonfile",
        "lowrank.patterns",
        "lowrank.reach",
        "lowrank.text",
    }


@pytest.mark.parametrize("leaf", ["errors.py", "text.py"])
def test_errors_and_text_know_nothing_of_the_library(leaf):
    assert own(imported_by(ROOT / leaf)) == set()


LAYERS = [
    {"errors", "text", "notices"},
    {"arguments", "jsonfile", "locks", "reach", "cardfile"},
    {"atomicfile"},
    {"patterns", "tensorfile", "folders", "linalg", "allocator", "devices", "modes", "_transformers"},
    {"integrity", "batches", "blocks", "textfiles", "fingerprints", "distributed"},
    {"lookups"},
    {"planning", "statistics", "objectives", "snapshots"},
    {"forms", "guards"},
    {"nn", "reads", "distillation", "menus", "sums", "streams"},
    {"ties", "inheritance"},
    {"obstacles", "runs"},
    {"factoring", "trials", "blockwise", "heads"},
    {"coding"},
    {"outlooks"},
    {"targets", "leftovers", "calibration", "ranks", "surgery", "recovery", "evaluation"},  # the stages
    {"anchoring", "quantizing", "sharing", "overruling"},
    {"plot", "costs", "latency"},
    {"deciding"},
    {"reporting"},
    {"cards"},
    {"checkpoint", "pipeline", "benchmarking"},
    {"hf"},
    {"demo", "startup"},
    {"cli"},
]
"""From below to above: a file imports only what stands below it, inside functions as well."""


def layer_of(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


@pytest.mark.parametrize("path", [p for p in FILES if p.name not in ("__init__.py", "__main__.py")], ids=ids)
def test_a_file_imports_only_from_below(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    here = layer_of(f"lowrank.{room}")
    others = [
        name for name in own(imported_by(path)) if len(name.split(".")) > 1 and name.split(".")[1] != room
    ]
    modules = {name.split(".")[1] for name in others if any(name.split(".")[1] in rooms for rooms in LAYERS)}
    assert {name for name in modules if layer_of(f"lowrank.{name}") >= here} == set()


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


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "surgery.py"], ids=ids)
def test_only_surgery_replaces_modules(path):
    assert swaps(tree_of(path)) == []


def test_the_detector_of_swaps_sees_the_one_in_surgery():
    assert len(swaps(tree_of(ROOT / "surgery.py"))) == 1


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
    if path.name in ("cli.py", "demo.py"):  # they load models, but only when run
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

"""The house stays one that can be lived in: sizes of files and functions, and tests that mirror the tree."""

import ast
import re
import statistics
from pathlib import Path

import pytest

import lowrank

ROOT = Path(lowrank.__file__).parent
TESTS = ROOT.parent / "tests"
SOURCES = sorted(ROOT.rglob("*.py"))
TEST_FILES = sorted(
    path for path in TESTS.rglob("test_*.py") if path.parent.name not in ("attack", "helpers", "tests")
)


def ids(path: Path) -> str:
    return path.relative_to(ROOT.parent).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_half_of_the_files_have_at_most_150_lines():
    sizes = [
        len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES if path.stem != "__init__"
    ]
    assert statistics.median(sizes) <= 150


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, its docstring left out."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    told = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - told


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_function_has_at_most_60_lines(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {node.name: lines_of_code(node) for node in functions if lines_of_code(node) > 60} == {}


NO_TESTS_OF_THEIR_OWN = {
    "allocation/costs.py": "a record of four fields, which the tests of byte_costs and latency fill and read",
}
"""Source files without a test file, and why."""


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.stem.startswith("__")], ids=ids)
def test_a_file_has_a_test_file_of_its_name(path):
    name = f"test_{path.stem.removeprefix('_')}.py"
    there = (TESTS / path.relative_to(ROOT).parent / name).is_file()
    assert there != (path.relative_to(ROOT).as_posix() in NO_TESTS_OF_THEIR_OWN)


def test_files_without_tests_are_few_and_there():
    assert len(NO_TESTS_OF_THEIR_OWN) <= 5
    assert all((ROOT / name).is_file() for name in NO_TESTS_OF_THEIR_OWN)


@pytest.mark.parametrize("path", TEST_FILES, ids=ids)
def test_a_test_stands_where_the_file_stands_that_it_tests(path):
    package = ROOT / path.parent.relative_to(TESTS)
    stems = {source.stem for source in package.glob("*.py")}
    name = path.stem.removeprefix("test_")
    assert any(name == stem or name.startswith(f"{stem}_") for stem in stems)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=ids)
def test_a_test_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    "package", sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file())
)
def test_every_package_has_tests(package):
    assert list((TESTS / package).glob("test_*.py"))


def raises_without_match(tree: ast.AST) -> list[int]:
    """Return the lines of ``pytest.raises`` and ``pytest.warns`` that look at no message.

    A Ctrl-C has none to look at.
    """
    return [
        call.lineno
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("pytest.raises", "pytest.warns")
        and not any(keyword.arg == "match" for keyword in call.keywords)
        and ast.unparse(call.args[0]) != "KeyboardInterrupt"
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=ids)
def test_an_expected_error_is_known_by_its_message(path):
    assert raises_without_match(ast.parse(path.read_text(encoding="utf-8"))) == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_", "_transformers")


def names_defined(tree: ast.AST) -> set[str]:
    """Return the names of functions, classes, and of variables outside of functions."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = {node.name for node in ast.walk(tree) if isinstance(node, definitions)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            targets = [
                target for line in node.body if isinstance(line, ast.Assign) for target in line.targets
            ]
            targets += [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


PRIVATE = {
    name for path in SOURCES for name in names_defined(ast.parse(path.read_text("utf-8"))) if is_private(name)
}


def private_names_used(tree: ast.AST) -> list[str]:
    """Return the private names of the library that code imports, reads, or names in a text, to patch them."""
    own = names_defined(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowrank":
            found += [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE - own:
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            patched = node.value if re.fullmatch(r"_\w+|lowrank(\.\w+)+", node.value) else ""
            found += [name for name in patched.split(".") if name in PRIVATE - own]
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=ids)
def test_no_test_reaches_for_a_private_name(path):
    assert private_names_used(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "from lowrank.linalg.matmul import _available",
        "matmul._available()",
        "patch.setattr(matmul, '_available', None)",
        "patch.setattr('lowrank.linalg.matmul._available', None)",
        "layer._trained_weight()",
    ],
)
def test_the_detector_sees_how_private_names_are_reached_for(code):
    assert len(private_names_used(ast.parse(code))) == 1


def test_the_detector_leaves_other_libraries_and_ones_own_names_alone():
    code = "class Own:\n    _available = 1\nOwn._available\nmodule._forward_hooks\n'lowrank._transformers'"
    assert private_names_used(ast.parse(code)) == []


@pytest.mark.parametrize("call", ["pytest.raises(ValueError)", "pytest.warns(UserWarning)"])
def test_the_detector_sees_an_error_of_any_message(call):
    assert raises_without_match(ast.parse(f"with {call} as caught:\n    pass")) == [1]

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


@pytest.mark.parametrize("path", TEST_FILES, ids=ids)
def test_a_test_stands_where_the_file_stands_that_it_tests(path):
    package = ROOT / path.parent.relative_to(TESTS)
    stems = {source.stem for source in package.glob("*.py")}
    name = path.stem.removeprefix("test_")
    assert any(name == stem or name.startswith(f"{stem}_") for stem in stems)


@pytest.mark.parametrize(
    "package", sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file())
)
def test_every_package_has_tests(package):
    assert list((TESTS / package).glob("test_*.py"))


def raises_without_match(tree: ast.AST) -> list[int]:
    """Return the lines of ``pytest.raises`` of an error of this library that look at no message."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and isinstance(node.context_expr, ast.Call):
            call = node.context_expr
            raises = isinstance(call.func, ast.Attribute) and call.func.attr == "raises"
            matched = (
                any(keyword.arg == "match" for keyword in call.keywords) or node.optional_vars is not None
            )
            if raises and not matched and "Error" in ast.dump(call.args[0]):
                found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=ids)
def test_an_expected_error_is_known_by_its_message(path):
    assert raises_without_match(ast.parse(path.read_text(encoding="utf-8"))) == []


PRIVATE = re.compile(r"from lowrank[\w.]* import [^\n]*(?<![\w.])_(?!transformers)\w+")


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=ids)
def test_no_test_imports_a_private_name(path):
    assert PRIVATE.findall(path.read_text(encoding="utf-8")) == []

"""Everything that the documentation shows runs: its pages, the docstrings, the notebooks."""

import ast
import doctest
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import lowrank
import lowrank.demo
from lowrank.config.options import markdown_table

ROOT = Path(lowrank.__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    page
    for page in (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text(encoding="utf-8")
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted(m.name for m in pkgutil.walk_packages(lowrank.__path__, "lowrank."))
UNTESTED = {"lowrank.__main__", "lowrank.config.__main__"}


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return ``(line number, code)`` of the ```python blocks that run here.

    Those marked ``<!-- no-run -->`` do not, nor those marked ``<!-- needs PACKAGE -->`` without that package.
    """
    lines = text.splitlines()
    blocks, start = [], None
    for number, line in enumerate(lines):
        if start is None and re.fullmatch(r"\s*```python\s*", line):
            start = number
        elif start is not None and re.fullmatch(r"\s*```\s*", line):
            before = lines[start - 1].strip() if start else ""
            needs = re.fullmatch(r"<!-- needs (\w+) -->", before)
            missing = needs is not None and importlib.util.find_spec(needs[1]) is None
            if before != "<!-- no-run -->" and not missing:
                blocks.append((start + 1, "\n".join(lines[start + 1 : number])))
            start = None
    return blocks


def test_marked_blocks_and_other_languages_are_left_out():
    text = (
        "```python\na = 1\n```\n<!-- no-run -->\n```python\nb\n```\n```bash\nc\n```\n```python\nd = 2\n```\n"
        "<!-- needs no_such_package -->\n```python\ne\n```\n<!-- needs json -->\n```python\nf = 3\n```\n"
    )
    assert python_blocks(text) == [(1, "a = 1"), (11, "d = 2"), (19, "f = 3")]


def test_the_readme_runs_from_top_to_bottom_without_a_warning_of_few_data(tmp_path, monkeypatch):
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block that runs"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", lowrank.FewTokensWarning)
        for line, code in blocks:
            tree = ast.parse(code, filename=f"README.md:{line}")
            ast.increment_lineno(tree, line)
            exec(compile(tree, str(README), "exec"), namespace)


def test_the_command_line_of_the_readme_works_as_it_is_pasted(tmp_path):
    text = README.read_text(encoding="utf-8").partition("## On the command line")[2]
    code = text.partition("```bash\n")[2].partition("```")[0]
    assert code.count("lowrank ") >= 6
    here = f'python() {{ {sys.executable} "$@"; }}; lowrank() {{ python -m lowrank "$@"; }}; set -e\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", here + code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 0.5 < float(re.search(r"^cosine (0\.\d{4})$", done.stdout, re.MULTILINE)[1]) < 1
    assert json.loads((tmp_path / "report.json").read_text())["kept_fraction"] < 1
    train, test = (set((tmp_path / name).read_text().splitlines()) for name in ("train.txt", "test.txt"))
    assert len(train) == 320 and len(test) == 80 and not train & test


@pytest.mark.parametrize("name", sorted({"lowrank", *MODULES} - UNTESTED))
def test_the_examples_in_the_docstrings_are_right(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_there_are_examples_in_the_docstrings():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES if name not in UNTESTED]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 5


def test_the_example_of_the_config_is_right():
    pytest.importorskip("transformers")
    assert doctest.testmod(importlib.import_module("lowrank.hf.config")).failed == 0


@pytest.mark.filterwarnings("ignore::UserWarning:lowrank")  # of too few tokens, as they are here
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    every = lowrank.demo.sentences
    first_words = [" ".join(sentence.split()[:2]) for sentence in every(1000)]  # takes seconds, not minutes
    monkeypatch.setattr(lowrank.demo, "sentences", lambda count: first_words[:count])
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in python_blocks(page.read_text(encoding="utf-8")):
        tree = ast.increment_lineno(ast.parse(code, filename=f"{page.name}:{line}"), line)
        exec(compile(tree, str(page), "exec"), namespace)


def test_the_pages_with_examples_are_found():
    assert {page.name for page in PAGES} >= {"CONTRIBUTING.md", "guide.md", "index.md"}


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient")
    nbformat = pytest.importorskip("nbformat")
    if importlib.util.find_spec("ipykernel") is None:
        pytest.skip("notebooks need ipykernel")
    book = nbformat.read(notebook, as_version=4)
    assert any(cell.cell_type == "code" for cell in book.cells)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=resources).execute()


DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
FOUND_IN = re.findall(
    r"^\| (.+?) \| `([\w/.]+\.py)` \|$", DESIGN.partition("## Where do I find")[2], flags=re.M
)


def test_the_table_of_where_to_find_what_is_long_enough():
    assert len(FOUND_IN) >= 30
    assert len({question for question, _ in FOUND_IN}) == len(FOUND_IN)


@pytest.mark.parametrize(("question", "file"), FOUND_IN, ids=[question for question, _ in FOUND_IN])
def test_a_file_that_the_design_names_is_there(question, file):
    assert (ROOT / "lowrank" / file).is_file()


def test_the_design_describes_every_package_and_file_at_the_top():
    table = DESIGN.partition("## The packages")[2].partition("## Where do I find")[0]
    described = set(re.findall(r"`(\w+)(?:\.py|/)`", table)) - {"tests", "benchmarks"}
    there = {path.name.removesuffix(".py") for path in (ROOT / "lowrank").iterdir() if path.name[0] != "."}
    assert described - {"test_imports"} == there - {"__init__", "__main__", "__pycache__", "py.typed"}


@pytest.mark.parametrize("config", [lowrank.CompressionConfig, lowrank.RecoveryConfig])
def test_the_guide_has_the_table_of_options(config):
    assert markdown_table(config) in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")

"""`lowrank setup` lets other programs load compressed checkpoints, and costs next to nothing."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import lowrank
from lowrank.cli import startup

ROOT = Path(lowrank.__file__).parent.parent
LOAD = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
print(type(model.encoder.layer[0].attention.self.query).__name__)
"""


class Environment:
    """A virtual environment that sees the packages of this one and the library, and no ``PYTHONPATH``."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site_packages = Path(sysconfig.get_path("purelib", "posix_venv", vars=paths))
        self.library = self.site_packages / "library.pth"
        self.library.write_text(f"{ROOT}\n")
        (self.site_packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        self.hook = self.site_packages / startup.FILE

    def run(self, *arguments: object) -> subprocess.CompletedProcess:
        known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.python), *map(str, arguments)]
        environment = {**known, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "venv")


def test_a_program_without_import_lowrank_loads_the_folder_after_setup(environment, tiny_bert, tmp_path):
    lowrank.save(lowrank.compress(tiny_bert, rank=8), tmp_path / "small")
    before = environment.run("-c", LOAD, tmp_path / "small")
    assert before.returncode != 0
    assert "Unknown quantization type, got lowrank" in before.stderr

    done = environment.run("-m", "lowrank", "setup")
    assert done.returncode == 0, done.stderr
    assert str(environment.hook) in done.stdout
    after = environment.run("-c", LOAD, tmp_path / "small")
    assert after.returncode == 0, after.stderr
    assert after.stdout.split()[-1] == "LowRankLinear"

    assert environment.run("-m", "lowrank", "setup", "--remove").returncode == 0
    assert not environment.hook.exists()


def test_the_hook_imports_next_to_nothing_when_python_starts(environment):
    show = "import sys; print(*sorted(sys.modules))"
    before = set(environment.run("-c", show).stdout.split())
    startup.install(environment.site_packages)
    done = environment.run("-c", show + "\nprint([type(f).__name__ for f in sys.meta_path][0])")
    *loaded, finder = done.stdout.split()
    assert done.stderr == ""
    assert finder == "PluginFinder"
    assert set(loaded) - before <= {"importlib", "importlib.machinery", "importlib._bootstrap"} | {
        "importlib._bootstrap_external",
        "warnings",
        "__future__",
    }


def test_python_starts_without_a_word_when_the_library_is_gone(environment, tmp_path):
    startup.install(environment.site_packages)
    environment.library.unlink()  # the hook's file is still there, the package is not
    done = environment.run("-W", "error", "-c", "import transformers.modeling_utils")
    assert (done.returncode, done.stderr) == (0, "")
    gone = environment.hook.read_text().replace("_transformers.py", "no_such_file.py")
    environment.hook.write_text(gone)
    done = environment.run("-W", "error", "-c", "import sys; print(type(sys.meta_path[0]).__name__)")
    assert (done.returncode, done.stderr) == (0, "")
    assert "PluginFinder" not in done.stdout


def test_an_import_of_lowrank_besides_changes_nothing(environment):
    startup.install(environment.site_packages)
    code = """
import sys, lowrank, transformers.modeling_utils as m
print(type(m.__loader__).__name__, type(m.__spec__.loader).__name__)
print("PluginFinder" in [type(finder).__name__ for finder in sys.meta_path], "lowrank.hf" in sys.modules)
"""
    done = environment.run("-c", code)
    assert done.stdout.split() == ["SourceFileLoader", "SourceFileLoader", "False", "True"], done.stderr


def test_setup_twice_is_setup_once(tmp_path):
    first = startup.install(tmp_path).read_text()
    assert startup.install(tmp_path).read_text() == first
    assert len(first.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == [startup.FILE]
    startup.uninstall(tmp_path)
    startup.uninstall(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [startup.install, startup.uninstall])
def test_a_folder_that_cannot_be_written_is_named(change, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(lowrank.LowRankError, match=r"file/lowrank-startup\.pth: cannot be changed: .*own\."):
        change(tmp_path / "file")


def test_the_hook_belongs_to_the_environment_of_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "purelib" else None)
    assert startup.install() == tmp_path / startup.FILE


def test_a_path_with_other_letters_is_written_in_ascii(monkeypatch, tmp_path):
    monkeypatch.setattr(lowrank._transformers, "__file__", str(tmp_path / "Größe'n" / "_transformers.py"))
    line = startup.install(tmp_path).read_text(encoding="ascii")
    compile(line, "line", "exec")
    assert line.startswith("import ")

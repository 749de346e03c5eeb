"""Let all programs of a Python environment load compressed checkpoints, by a hook that users ask for.

When Python starts, it runs the lines of the ``.pth`` files in its site-packages. Ours runs
`lowrank._transformers` alone, which imports the library once transformers' models have been imported.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from lowrank import _transformers
from lowrank.errors import LowRankError

FILE = "lowrank-startup.pth"

_LINE = (
    "import importlib.machinery as m, os; "
    "name, file = 'lowrank_startup', {hook}; space = {{'__name__': name}}; "
    "os.path.isfile(file) and exec(m.SourceFileLoader(name, file).get_code(name), space); "
    "os.path.isfile(file) and space['watch']()\n"
)
"""One line, as Python demands; without the library's files it does nothing."""


def install(site_packages: Path | None = None) -> Path:
    """Write the hook into ``site_packages``, by default those of this Python, and return its file.

    Raises:
        LowRankError: If it cannot be written there.
    """
    file = _file(site_packages)
    unfinished = file.with_name(f"{FILE}.new")
    try:
        unfinished.write_text(_LINE.format(hook=ascii(_transformers.__file__)), encoding="ascii")
        unfinished.replace(file)
    except OSError as error:
        raise _refused(file, error) from error
    finally:
        if unfinished.is_file():
            unfinished.unlink()
    return file


def uninstall(site_packages: Path | None = None) -> Path:
    """Remove what `install` wrote, if it is there, and return its file.

    Raises:
        LowRankError: If it cannot be removed.
    """
    file = _file(site_packages)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise _refused(file, error) from error
    return file


def _file(site_packages: Path | None) -> Path:
    return (site_packages or Path(sysconfig.get_path("purelib"))) / FILE


def _refused(file: Path, error: OSError) -> LowRankError:
    return LowRankError(
        f"{file}: cannot be changed: {error}. Call lowrank setup as the user to whom this Python belongs, "
        "or in a virtual environment of your own."
    )

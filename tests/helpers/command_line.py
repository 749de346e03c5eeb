"""The command line in a new process, and the one line that a failure prints."""

import os
import subprocess
import sys


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def program(*arguments: object) -> subprocess.CompletedProcess:
    """Call the program in a new process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lowrank", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


def one_line(result: Result) -> str:
    """Return the only line on stderr."""
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("lowrank: ") and "Traceback" not in line
    return line

"""Measure what ``import lowrank`` adds to ``import torch``, in fresh processes. The goal: at most 150 ms."""

from __future__ import annotations

import statistics
import subprocess
import sys

from common import finish, parser

PROGRAM = """
import time
import torch
start = time.perf_counter()
import lowrank
print(time.perf_counter() - start)
"""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    seconds = [
        float(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True).stdout)
        for _ in range(options.repeats + 1)
    ][1:]
    figures = {"median_seconds": statistics.median(seconds), "max_seconds": max(seconds), "goal": 0.15}
    finish("import_time", figures, options.out)


if __name__ == "__main__":
    main()

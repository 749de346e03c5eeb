"""Read texts for calibration and evaluation from plain files."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from lowrank.errors import DataError


def read_text(path: str | Path) -> str:
    """Return the whole file, as UTF-8.

    Raises:
        DataError: If it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty.")
    return text


def read_lines(path: str | Path) -> list[str]:
    """Return the lines that have text, one sample each."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_pairs(path: str | Path) -> tuple[list[tuple[str, str]], list[float]]:
    """Read ``sentence1,sentence2,score`` as CSV without a header, as STS Benchmark has it."""
    pairs, scores = [], []
    rows = csv.reader(read_text(path).splitlines(keepends=True))
    try:
        for row in rows:
            first, second, score = row
            number = float(score)
            if not math.isfinite(number):
                raise DataError(f"{path}, line {rows.line_num}: the score {score} is not finite.")
            scores.append(number)
            pairs.append((first, second))
    except (ValueError, csv.Error) as error:
        header = " Is that a header? Remove it." if rows.line_num == 1 else ""
        raise DataError(
            f"{path}, line {rows.line_num}: not sentence1,sentence2,score: {error}.{header}"
        ) from error
    return pairs, scores


def read_labelled(path: str | Path) -> tuple[list[str], list[int]]:
    """Read ``sentence<TAB>label`` with whole numbers as labels, as SST-2 has it."""
    texts, labels = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        text, tab, label = line.strip().rpartition("\t")
        if not tab or not re.fullmatch(r"[0-9]{1,9}", label):
            raise DataError(f"{path}, line {number}: not sentence<TAB>label: {line[:80]!r}.")
        texts.append(text)
        labels.append(int(label))
    return texts, labels

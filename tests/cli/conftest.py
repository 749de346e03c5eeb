"""Folders and texts for the command line."""

import copy
from pathlib import Path

import pytest

import lowrank


@pytest.fixture
def dense(tiny_bert, tmp_path) -> Path:
    """A folder with a dense BERT."""
    tiny_bert.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def small(tiny_bert, tmp_path) -> Path:
    """A folder with the same BERT, compressed."""
    lowrank.compress(copy.deepcopy(tiny_bert), rank=8).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def minilm() -> Path:
    """The real checkpoint, which has a tokenizer; test-long options stay away from it."""
    from lowrank.demo import minilm_folder

    return minilm_folder()


@pytest.fixture
def texts(tmp_path) -> Path:
    words = [
        "a",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "many",
        "other",
        "animals",
        "look",
        "on",
    ]
    lines = [" ".join(words[i % 7 : i % 7 + 3 + i % 5]) for i in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return tmp_path / "texts.txt"

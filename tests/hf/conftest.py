"""Folders with a compressed BERT, with and without digests."""

from pathlib import Path

import pytest
from saved_models import small

import lowrank


@pytest.fixture
def saved(tmp_path) -> Path:
    small().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def with_digests(tmp_path) -> Path:
    return lowrank.save(small(), tmp_path / "small")

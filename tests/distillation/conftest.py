"""A small model to recover, and data for it."""

import copy

import pytest
from random_tensors import gaussian

from lowrank import compress


@pytest.fixture
def data():
    return [gaussian(32, 64, seed=i) for i in range(12)]


@pytest.fixture
def small(mlp):
    return compress(copy.deepcopy(mlp), rank=8)

"""The options of recovery, checked when the config is made."""

import math
import typing

import numpy as np
import pytest

from lowrank import LowRankError
from lowrank.config import RecoveryConfig, RecoveryOptions
from lowrank.config.options import options_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^Give either minutes or steps; got minutes=None and steps=None\."),
        ({"minutes": 1, "steps": 1}, "got minutes=1 and steps=1"),
        ({"steps": 0}, "steps=0: the duration must be positive"),
        ({"steps": 2.5}, r"^steps=2\.5: give a whole number"),
        ({"steps": True}, "^steps=True: give a whole number"),
        ({"minutes": math.nan}, "minutes=nan, .*must be positive"),
        ({"minutes": -1}, "minutes=-1, .*must be positive"),
        ({"steps": 1, "learning_rate": 0}, "^learning_rate=0: give a positive number"),
        ({"steps": 1, "learning_rate": math.nan}, "^learning_rate=nan: give a positive number"),
        ({"steps": 1, "hidden_weight": -0.5}, r"^hidden_weight=-0\.5: "),
        ({"steps": 1, "held_out": 0}, "^held_out=0: "),
        ({"steps": 1, "batch_size": 0}, "^batch_size=0: "),
        ({"steps": 1, "max_length": 1.5}, r"^max_length=1\.5: "),
        ({"steps": 1, "blockwise": "yes"}, "^blockwise='yes': "),
        ({"steps": 1, "mixed_precision": 1}, "^mixed_precision=1: "),
        ({"steps": 1, "seed": -1}, "^seed=-1: "),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_refused_by_its_name(options, message):
    with pytest.raises(LowRankError, match=message):
        RecoveryConfig(**options)


def test_steps_of_numpy_are_whole_numbers():
    steps = RecoveryConfig(steps=np.int64(3)).steps
    assert steps == 3 and type(steps) is int


def test_the_typed_dictionary_keeps_step_with_the_definition():
    assert list(typing.get_type_hints(RecoveryOptions)) == [one.name for one in options_of(RecoveryConfig)]

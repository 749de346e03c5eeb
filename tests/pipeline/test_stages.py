"""The stages that `compress` goes through: what is overruled is tried first."""

import pytest
from doubtful_layers import Penalized, Twice, X, seeded
from torch import nn

import lowrank
from lowrank import DataError, LowRankLinear, TargetError


def test_a_plan_by_hand_is_tried_before_it_is_applied():
    model = seeded(lambda: nn.Sequential(Twice(32, 32), nn.Linear(32, 32)))
    plan = lowrank.plan(model, rank=4).with_rank("*", 4)
    layer = plan["0"]
    by_hand = plan.with_layers({"0": type(layer)(**{**vars(layer), "overruled": True})})
    with pytest.raises(TargetError, match="0: overrule= cannot be followed"):
        lowrank.apply(model, by_hand)
    assert type(model[0]) is Twice


@pytest.mark.parametrize("data", [lambda: [X] * 4, lambda: iter([X] * 4)], ids=["list", "iterator"])
def test_the_first_batch_of_the_data_serves_to_try_it(data):
    model = lowrank.compress(seeded(Penalized), rank=4, overrule=["proj"], data=data())
    assert isinstance(model.proj, LowRankLinear) and type(model.out) is nn.Linear
    coded = lowrank.compress(seeded(Penalized), rank=4, overrule=["proj"], data=data(), quantize="int8")
    assert isinstance(coded.proj.down, lowrank.QuantizedLinear)


def test_statistics_cover_what_is_overruled_where_they_are_told():
    model = seeded(Penalized)
    stats = lowrank.calibrate(model, [X] * 4, overrule=["proj"])
    assert "proj" in stats and "out" not in stats
    plan = lowrank.plan(model, rank=4, stats=stats, overrule=["proj"], inputs=X)
    assert plan["proj"].rank == 4


def test_without_inputs_a_reading_cannot_be_overruled():
    with pytest.raises(DataError, match=r"^out: has its weight read by value in Penalized.*give inputs="):
        lowrank.compress(seeded(Penalized), rank=4, overrule=["out"])


def test_a_pattern_to_overrule_must_match_a_layer():
    with pytest.raises(TargetError, match='"proi" matches none of the 2 linear layers'):
        lowrank.plan(seeded(Penalized), rank=4, overrule=["proi"], inputs=X)
    with pytest.raises(TargetError, match="overrule='proj': give a list of patterns"):
        lowrank.plan(seeded(Penalized), rank=4, overrule="proj", inputs=X)

"""Whoever has something to ask of a model asks the adapter, which was registered last."""

import pytest
import transformers
from torch import nn

import lowrank
from lowrank.adapter import Adapter, adapter, inspect, register_adapter
from lowrank.hf.adapter import TransformersAdapter


@pytest.fixture
def registered():
    """Register an adapter for the time of a test."""
    before = adapter()
    yield register_adapter
    register_adapter(before)


def test_transformers_adapter_is_there_once_its_models_are():
    assert transformers.PreTrainedModel  # which loads them
    assert isinstance(adapter(), TransformersAdapter)


def test_the_default_answers_for_plain_modules(registered, tmp_path):
    registered(Adapter())
    classifier = nn.Sequential(nn.Conv2d(4, 64, 3), nn.Flatten(), nn.Linear(64, 8))
    assert inspect(classifier).known_heads == {"2": "2"}
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    seen = inspect(model)
    assert seen.separately_saved == ()
    assert adapter().recorded(model) is None and not adapter().saves(model)
    assert adapter().saved_tensors(model).keys() == model.state_dict().keys()
    small = lowrank.compress(model, keep=0.5)
    again = lowrank.load(lowrank.save(small, tmp_path / "small"), nn.Sequential(*map(dense, model)))
    assert [(n, t.tolist()) for n, t in again.state_dict().items()] == [
        (n, t.tolist()) for n, t in small.state_dict().items()
    ]


def dense(module: nn.Module) -> nn.Module:
    return nn.ReLU() if isinstance(module, nn.ReLU) else nn.Linear(64, 64)


def test_the_last_one_that_was_registered_is_asked_for_heads(registered):
    class First(Adapter):
        def heads(self, seen):
            return {"0": "the first layer"}

    registered(First())
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    planned = lowrank.plan(model, rank=8)
    assert [layer.rank for layer in planned] == [None, 8]
    assert planned["0"].reason == "part of a head (the first layer)"

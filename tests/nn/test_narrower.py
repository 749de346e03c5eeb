"""Narrower layers are the model's own types, and remember how wide they were."""

import copy
import io

import pytest
import torch
from torch import nn

from lowrank.nn import features_before, forget_features_before, layer_type_of, narrower_layer


def conv1d():
    transformers = pytest.importorskip("transformers")
    return transformers.pytorch_utils.Conv1D(5, 3)


@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 5), conv1d], ids=["linear", "conv1d"])
def test_a_narrower_layer_is_of_the_type_and_computes_with_the_weight(build):
    layer_type = layer_type_of(build())
    weight, bias = torch.arange(6.0).reshape(2, 3), nn.Parameter(torch.tensor([1.0, -1.0]))
    layer = narrower_layer(layer_type, weight, bias, (5, 3))
    assert type(layer) is type(build()) and features_before(layer) == (5, 3)
    assert torch.equal(layer(torch.eye(3)), weight.T + bias)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_copies_and_pickles_remember_and_ordinary_layers_have_nothing_to():
    layer = narrower_layer(layer_type_of(nn.Linear(3, 5)), torch.ones(2, 3), None, (5, 3))
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    assert features_before(copy.deepcopy(layer)) == features_before(again) == (5, 3)
    assert features_before(nn.Linear(3, 5)) is None
    forget_features_before(layer)
    assert features_before(layer) is None

"""One walk over a model, and what it found."""

from collections import Counter

import pytest
import torch
from blocked_layers import Scaled
from torch import nn

from lowrank import LowRankLinear, compress, plan
from lowrank.errors import LowRankError, TargetError
from lowrank.inspection import inspection


@pytest.mark.parametrize(
    "model",
    [nn.Linear(64, 64), Scaled(64, 64), LowRankLinear(64, 64, 4)],
    ids=["linear", "subclass", "low-rank"],
)
def test_a_model_that_is_a_linear_layer_itself_is_refused_with_the_way_out(model):
    way = (
        r"dense_weight\(\)"
        if isinstance(model, LowRankLinear)
        else r"LowRankLinear\.from_linear\(layer, rank\)"
    )
    message = rf"The model is itself a {type(model).__name__}.*{way}"
    with pytest.raises(TargetError, match=message):
        plan(model, rank=4)


def test_something_that_is_no_module_is_refused_with_the_way_out():
    with pytest.raises(LowRankError, match=r"A model is a torch\.nn\.Module, not str.*from_pretrained"):
        plan("bert-base-uncased", rank=4)


@pytest.fixture
def counted(monkeypatch):
    """How often the code of a model is read, and each weight hashed."""
    counts = Counter()
    read, hashed = inspection.find_readers, inspection.fingerprint_of_layer
    monkeypatch.setattr(inspection, "find_readers", lambda model: counts.update(["scans"]) or read(model))
    monkeypatch.setattr(
        inspection, "fingerprint_of_layer", lambda layer: counts.update([id(layer.weight)]) or hashed(layer)
    )
    return counts


@pytest.mark.parametrize("ask", [{"rank": 4, "targets": ["*"]}, {"keep": 0.5, "quantize": "int8"}], ids=str)
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
def test_one_call_inspects_the_model_once(counted, ask, calibrated):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=99))
    data = [{"input_ids": torch.randint(99, (4, 12))} for _ in range(6)] if calibrated else None
    compress(model, data=data, **ask)
    assert counted.pop("scans") == 1
    assert counted and set(counted.values()) == {1}

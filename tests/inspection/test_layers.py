"""A SentenceTransformer is refused with the name of the model inside of it, and that one works."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank


class Transformer(nn.Module):
    """As in sentence-transformers: features in, features out."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "token_embeddings": self.auto_model(**features).last_hidden_state}


class Pooling(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features["token_embeddings"].mean(1)}


class SentenceTransformer(nn.Sequential):
    """Stands in for the class of that name, which is not installed."""


for stand_in in (Transformer, Pooling, SentenceTransformer):
    stand_in.__module__ = "sentence_transformers.models"


class OfTheUsers(SentenceTransformer):
    pass


@pytest.fixture
def wrapped(tiny_bert):
    return SentenceTransformer(Transformer(tiny_bert), Pooling())


CALLS = {
    "compress": lambda model: lowrank.compress(model, rank=8),
    "compress-on-data": lambda model: lowrank.compress(model, rank=8, data=[torch.arange(8)[None]]),
    "plan": lambda model: lowrank.plan(model, rank=8),
    "calibrate": lambda model: lowrank.calibrate(model, [torch.arange(8)[None]]),
    "quantize": lambda model: lowrank.quantize(model, "int8"),
    "error_curves": lambda model: lowrank.error_curves(model),
    "decompress": lambda model: lowrank.decompress(model),
    "report": lambda model: lowrank.report(model),
    "recover": lambda model: lowrank.recover(model, model, [torch.arange(8)[None]], steps=1),
    "benchmark": lambda model: lowrank.benchmark(model, model, torch.arange(8)[None]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_error_names_the_model_inside(call, wrapped):
    before = copy.deepcopy(wrapped.state_dict())
    with pytest.raises(lowrank.LowRankError, match=r"is a SentenceTransformer, .* model\[0\]\.auto_model, "):
        call(wrapped)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())


def test_saving_one_is_refused_before_anything_is_written(wrapped, tmp_path):
    with pytest.raises(lowrank.LowRankError, match=r"model\[0\]\.auto_model"):
        lowrank.save(wrapped, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_subclass_and_one_of_its_modules_are_known_too(tiny_bert):
    with pytest.raises(lowrank.LowRankError, match=r"is a OfTheUsers, .* model\[0\]\.auto_model"):
        lowrank.compress(OfTheUsers(Transformer(tiny_bert)), rank=8)
    with pytest.raises(lowrank.LowRankError, match=r"is a Transformer, .* model\.auto_model"):
        lowrank.compress(Transformer(tiny_bert), rank=8)


def test_one_without_a_transformers_model_is_refused_as_well():
    with pytest.raises(lowrank.LowRankError, match=r"Pass the transformers model inside of it\."):
        lowrank.compress(SentenceTransformer(nn.Linear(64, 64)), rank=8)


def test_the_model_inside_can_be_compressed_in_place(wrapped):
    features = {"input_ids": torch.arange(8)[None]}
    wrapped.eval()
    lowrank.compress(wrapped[0].auto_model, rank=8)
    expected = wrapped[0].auto_model(**features).last_hidden_state.mean(1)
    assert torch.equal(wrapped(features)["sentence_embedding"], expected)
    assert isinstance(wrapped[0].auto_model.encoder.layer[0].attention.self.query, lowrank.LowRankLinear)

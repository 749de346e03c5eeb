"""Ties in transformers' lists: kept by every way of saving and loading."""

import pytest
from saved_models import FAMILIES, assert_same_outputs, every_family, factorized, outputs, small
from torch import nn


@every_family
def test_heads_and_tied_layers_stay_dense(build):
    model = small(build)
    heads = {"classifier", "qa_outputs", "lm_head", "decoder", "pooler"}
    assert not [
        name for name in factorized(model) if heads & set(name.split(".")) and "decoder.block" not in name
    ]


@every_family
def test_ties_survive_the_round_trip(build, tmp_path):
    model = small(build)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head is not None and head.weight is embedding.weight) == tied


@pytest.mark.parametrize("name", ["bert-masked-lm-tied", "gpt2-conv1d-tied", "roberta", "t5"])
def test_the_tied_families_are_really_tied(name):
    model = small(FAMILIES[name])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["bert-masked-lm-tied", "gpt2-conv1d-tied", "t5"])
def test_token_embeddings_can_be_resized(name, tmp_path):
    model = small(FAMILIES[name])
    model.resize_token_embeddings(107)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert outputs(model)[0].shape[-1] == 107
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_outputs(model, again)


@pytest.mark.parametrize("name", ["bert-masked-lm-tied", "gpt2-conv1d-tied"])
def test_tie_weights_keeps_the_tie(name):
    model = small(FAMILIES[name])
    model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

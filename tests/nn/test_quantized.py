"""Modules with integer weights: their state, copies, threads, and rows that are looked up."""

import copy
import io
import threading

import pytest
import torch
from random_layers import SCHEMES, integers
from random_tensors import gaussian
from torch import nn

from lowrank.linalg import Scheme
from lowrank.nn import QuantizedEmbedding, QuantizedLinear


def test_functional_calls_use_the_tensors_that_they_are_given():
    first, second = (
        QuantizedLinear.from_weight(gaussian(48, 64, seed=s), None, Scheme("int8")) for s in (0, 1)
    )
    x = gaussian(20, 64)
    with torch.no_grad():
        mine, theirs = first(x), second(x)
        assert torch.equal(torch.func.functional_call(first, second.state_dict(), x), theirs)
        assert torch.equal(first(x), mine)


def test_an_embedding_refuses_negative_indices():
    table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 64), Scheme("int4"))
    with pytest.raises(IndexError, match="out of range"):
        table(torch.tensor([-1]))


def test_copies_pickles_and_loads_give_the_same_bits(layer):
    x = gaussian(20, 64)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), first)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), first)
        other = QuantizedLinear(64, 48, True, layer.scheme)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), first)


@integers
def test_threads_may_be_the_first_to_call():
    layer = QuantizedLinear.from_weight(gaussian(48, 64), None, Scheme("int8"))
    found, errors = [], []

    def call():
        try:
            with torch.no_grad():
                found.append(layer(gaussian(20, 64)))
        except Exception as error:  # told below
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_embedding_looks_up_rows(scheme):
    table = nn.Embedding(10, 64, padding_idx=0)
    coded = QuantizedEmbedding.from_embedding(table, scheme)
    ids = torch.tensor([[1, 2, 3], [9, 0, 1]])
    assert (coded(ids) - table(ids)).norm() < 0.1 * table(ids).norm()
    assert torch.equal(coded(ids), coded.dense_weight()[ids])
    assert coded.half()(ids).dtype == torch.float16
    assert coded.padding_idx == 0

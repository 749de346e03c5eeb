"""Digests that differ when the thing differs, and only then."""

import copy

import torch
from torch import nn

from lowrank.inspection.fingerprints import fingerprint_of_layer, fingerprint_of_tokenizer


class Tokenizer:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


class OtherTokenizer(Tokenizer):
    pass


def test_a_layer_is_known_by_its_values_in_any_dtype_that_holds_them():
    layer = nn.Linear(64, 96).bfloat16()
    assert fingerprint_of_layer(layer) == fingerprint_of_layer(copy.deepcopy(layer).float())


def test_a_layer_that_was_trained_further_is_another():
    layer = nn.Linear(64, 96)
    before = fingerprint_of_layer(layer)
    with torch.no_grad():
        layer.weight.mul_(1 + 1e-6)
    assert fingerprint_of_layer(layer) != before


def test_a_layer_of_another_shape_is_another_also_without_data():
    shapes = [(64, 96), (96, 64), (32, 192)]
    zeros = [nn.utils.skip_init(nn.Linear, *shape) for shape in shapes]
    for layer in zeros:
        nn.init.zeros_(layer.weight)
    assert len({fingerprint_of_layer(layer) for layer in zeros}) == 3
    assert len({fingerprint_of_layer(nn.Linear(*shape, device="meta")) for shape in shapes}) == 3


def test_a_tokenizer_is_known_by_its_class_and_its_vocabulary():
    first = fingerprint_of_tokenizer(Tokenizer("a", "b"))
    assert first == fingerprint_of_tokenizer(Tokenizer("a", "b"))
    others = {
        fingerprint_of_tokenizer(other) for other in (Tokenizer("b", "a"), OtherTokenizer("a", "b"), len)
    }
    assert len(others) == 3 and first not in others
    assert fingerprint_of_tokenizer(None) == ""

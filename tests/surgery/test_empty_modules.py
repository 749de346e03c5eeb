"""Modules without data have the tensors that a plan lists, and no data."""

import pytest
from torch import nn

from lowrank.plans.layer_plan import EMBEDDING, LayerPlan, QuantizedWeight
from lowrank.plans.stored_tensors import quantized_tensors
from lowrank.surgery.empty_modules import empty_embedding, empty_quantized


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(
    "old", [nn.Linear(64, 32, bias=False), nn.Embedding(32, 64)], ids=["linear", "embedding"]
)
def test_a_quantized_module_has_the_tensors_of_its_entry(old, scheme):
    layer_type = "linear" if isinstance(old, nn.Linear) else EMBEDDING
    group = 32 if scheme == "int4" else None
    stored = QuantizedWeight("layer", layer_type, 32, 64, False, scheme, group)
    made = empty_quantized(stored, old)
    tensors = {name: tensor for name, tensor in made.state_dict().items() if tensor.numel()}
    expected = quantized_tensors(stored)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (part.shape, part.dtype) for name, part in expected.items()
    }
    assert all(tensor.is_meta for tensor in tensors.values())


def test_an_embedding_has_its_rank_and_the_padding_of_the_dense_one():
    layer = LayerPlan("table", EMBEDDING, 64, 32, False, rank=8, relative_error=0.25, added_bias=True)
    made = empty_embedding(layer, nn.Embedding(32, 64, padding_idx=3))
    assert (made.num_embeddings, made.embedding_dim, made.rank, made.padding_idx) == (32, 64, 8, 3)
    assert made.relative_error == 0.25 and made.bias is not None
    assert all(parameter.is_meta for parameter in made.parameters())

"""Layers that look as if they could not be factorized, and can: subclasses, and what is not read by value."""

import pytest
import torch
import transformers
from closeness import LAYERS32
from torch import nn

import lowrank
from lowrank.nn import layer_type_of

FAMILIES = {
    "Falcon": (transformers.FalconForCausalLM, {"hidden_size": 64, "num_attention_heads": 4}),
    "Bloom": (transformers.BloomForCausalLM, {"hidden_size": 64, "n_head": 4}),
    "T5": (transformers.T5ForConditionalGeneration, {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}),
    "gated T5": (
        transformers.T5ForConditionalGeneration,
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    cls, sizes = FAMILIES[request.param]
    config = cls.config_class(**sizes, vocab_size=99, num_hidden_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval()
    ids = torch.arange(24).reshape(2, 12)
    return model, {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def test_all_linear_layers_of_falcon_bloom_and_t5_are_targets(family):
    model, _ = family
    dense = [layer.name for layer in lowrank.plan(model, rank=8) if not layer.targeted]
    assert dense == ["lm_head"]


def test_falcon_bloom_and_t5_are_compressed_saved_loaded_and_dense_again(family, tmp_path):
    model, batch = family
    classes = [type(module) for module in model.modules()]
    before = model(**batch).logits
    for module in model.modules():  # of rank 4, so that factors of rank 4 lose nothing
        if layer_type_of(module) is not None and module is not model.get_output_embeddings():
            left, _, right = torch.linalg.svd(module.weight.data, full_matrices=False)
            module.weight.data = left[:, :4] @ right[:4]
    exact = model(**batch).logits
    assert (exact - before).norm() > 0.01 * before.norm()  # a hundred times what may be lost below
    lowrank.compress(model, rank=4)
    small = model(**batch).logits
    assert torch.allclose(small, exact, atol=LAYERS32 * exact.abs().max().item())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, small)
    lowrank.decompress(loaded)
    assert [type(module) for module in loaded.modules()] == classes
    assert torch.allclose(loaded(**batch).logits, small, atol=LAYERS32 * exact.abs().max().item())


def test_a_subclass_can_be_coded_calibrated_and_share_a_factor(family):
    model, batch = family
    lowrank.compress(model, keep=0.5, data=[batch] * 4, quantize="int8", share="inputs")
    assert model(**batch).logits.isfinite().all()
    assert len(lowrank.report(model).factorized) > 0
    kinds = {type(module) for module in lowrank.decompress(model).modules()}
    assert not any(cls.__module__.startswith("lowrank") for cls in kinds)

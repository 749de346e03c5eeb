"""Models of transformers that call their layers are not suspected, the others of just what they read."""

import pytest
import torch

from lowrank.inspection.eligibility import ineligible_layers
from lowrank.inspection.inspection import Inspection

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 16}
PLAIN = {
    "Bert": SIZES,
    "GPT2": {"n_embd": 64, "n_layer": 1, "n_head": 4},
    "Llama": SIZES,
    "ViT": IMAGE,
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "MobileBert": SIZES,
    "CLIP": {"text_config": SIZES, "vision_config": IMAGE},
    "T5": {"d_model": 64, "num_layers": 1},
    "Bloom": {"hidden_size": 64, "n_layer": 1, "n_head": 4},
    "Whisper": {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
}
BY_VALUE = {
    "Mamba": ({**SIZES, "state_size": 8}, {"x_proj", "dt_proj", "out_proj"}),
    "WavLM": (SIZES, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "Bloom": (
        {**PLAIN["Bloom"], "pretraining_tp": 2, "slow_but_exact": True},
        {"dense", "dense_4h_to_h"},
    ),
}


def read_in(family: str, sizes: dict) -> set[str]:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes))
    found = ineligible_layers(Inspection(model)).items()
    return {name.rpartition(".")[2] for name, reason in found if "read by value" in reason}


@pytest.mark.parametrize("family", PLAIN)
def test_a_transformers_model_that_calls_its_layers_is_not_suspected(family):
    assert read_in(family, PLAIN[family]) == set()


@pytest.mark.parametrize("family", BY_VALUE)
def test_a_transformers_model_that_reads_weights_is_suspected_of_just_these(family):
    sizes, layers = BY_VALUE[family]
    assert read_in(family, sizes) == layers

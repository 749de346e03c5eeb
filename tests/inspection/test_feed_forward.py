"""Feed-forward blocks are found from what a model computes, whatever its layers are called."""

import pytest
import torch
from torch import Tensor, nn

from lowrank.adapter import inspect
from lowrank.inspection.eligibility import ineligible_layers
from lowrank.inspection.feed_forward import FeedForward, feed_forward_blocks
from lowrank.nn import LowRankLinear

IDS = torch.arange(14).reshape(2, 7)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def found(model, **inputs):
    seen = inspect(model)
    return feed_forward_blocks(seen, lambda: model(**inputs), ineligible_layers(seen))


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES, vocab_size=99)), {"input_ids": IDS}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=99)), {"input_ids": IDS}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": IDS}


def t5(activation="relu"):
    from transformers import T5Config, T5Model

    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        vocab_size=99,
        feed_forward_proj=activation,
    )
    return T5Model(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)), {
        "pixel_values": torch.ones(2, 3, 16, 16)
    }


def whisper():
    from transformers import WhisperConfig, WhisperModel

    parts = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
    config = WhisperConfig(
        d_model=32,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in parts.items()},
        **dict.fromkeys(
            ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
            0,
        ),
        vocab_size=99,
        max_source_positions=10,
        num_mel_bins=8,
    )
    return WhisperModel(config), {"input_features": torch.ones(2, 8, 20), "decoder_input_ids": IDS}


CASES = {
    "bert": (bert, "encoder.layer.{}.output.dense", ["encoder.layer.{}.intermediate.dense"], 2),
    "llama": (
        llama,
        "model.layers.{}.mlp.down_proj",
        ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
        2,
    ),
    "gpt2": (gpt2, "transformer.h.{}.mlp.c_proj", ["transformer.h.{}.mlp.c_fc"], 2),
    "vit": (vit, "layers.{}.mlp.fc2", ["layers.{}.mlp.fc1"], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_every_block_of_a_stack_is_found_and_nothing_else(name):
    build, reader, writers, count = CASES[name]
    model, inputs = build()
    blocks, reasons = found(model, **inputs)
    expected = [
        FeedForward(reader.format(i), tuple(writer.format(i) for writer in writers)) for i in range(count)
    ]
    assert blocks == expected
    members = {name for block in blocks for name in (*block.writers, block.reader)}
    assert reasons.keys() == inspect(model).linear.keys() - members


@pytest.mark.parametrize(("activation", "writers"), [("relu", ["wi"]), ("gated-gelu", ["wi_0", "wi_1"])])
def test_blocks_of_an_encoder_and_a_decoder_are_found(activation, writers):
    model, inputs = t5(activation)
    blocks, _ = found(model, **inputs)
    places = ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]
    assert blocks == [
        FeedForward(f"{place}.wo", tuple(f"{place}.{writer}" for writer in writers)) for place in places
    ]
    model, inputs = whisper()
    blocks, _ = found(model, **inputs)
    assert [block.reader for block in blocks] == ["encoder.layers.0.fc2", "decoder.layers.0.fc2"]


class Own(nn.Module):
    """A block whose middle is given; ``b`` may stand beside ``a``."""

    def __init__(self, middle, after=lambda h, y: y):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.middle, self.after = middle, after
        self.norm, self.scale = nn.LayerNorm(12), nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self, x)
        return self.after(hidden, self.c(hidden))


X = torch.ones(2, 3, 8)
MIDDLES = {
    "an-activation": (lambda m, x: m.a(x).relu(), ("a",)),
    "a-gate": (lambda m, x: torch.sigmoid(m.b(x)) * m.a(x), ("a", "b")),
    "in-place-and-cast": (lambda m, x: m.a(x).relu_().double().float(), ("a",)),
    "flattened-rows": (lambda m, x: torch.tanh(m.a(x)).view(-1, 12).mul(2.0), ("a",)),
    "rows-scaled": (lambda m, x: m.a(x).relu() * x[..., :1], ("a",)),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_elementwise_functions_leave_a_block_one(name):
    middle, writers = MIDDLES[name]
    blocks, _ = found(Own(middle), x=X)
    assert blocks == [FeedForward("c", writers)]


@pytest.mark.parametrize(
    ("middle", "after", "reason"),
    [
        (lambda m, x: m.a(x).softmax(-1), None, "_softmax"),
        (lambda m, x: m.norm(m.a(x).relu()), None, "native_layer_norm"),
        (lambda m, x: m.a(x) * m.scale, None, "other features in aten.mul"),
        (lambda m, x: m.a(x) / m.a(x).pow(2).mean(-1, keepdim=True), None, "aten.mean"),
        (lambda m, x: m.a(x).relu().flip(-1), None, "aten.flip"),
        (lambda m, x: m.a(x).transpose(1, 2).reshape(2, 3, 12), None, "aten.transpose"),
        (lambda m, x: m.a(x), lambda h, y: (h, y), "is among the model's outputs"),
        (lambda m, x: m.a(x), lambda h, y: y + h[..., :8], "aten.slice"),
        (lambda m, x: torch.zeros(2, 3, 12).copy_(m.a(x)), None, "aten.copy_"),
    ],
    ids=["softmax", "norm", "scales", "own-norm", "order", "moved", "output", "residual", "buffer"],
)
def test_what_mixes_features_or_reads_them_elsewhere_is_named(middle, after, reason):
    blocks, reasons = found(Own(middle, after or (lambda h, y: y)), x=X)
    assert blocks == [] and reason in reasons["a"]


def test_features_that_two_layers_read_are_left_alone():
    blocks, reasons = found(Own(lambda m, x: m.a(x).relu(), lambda h, y: y), x=X)
    assert blocks and "b" in reasons
    model = nn.ModuleDict({"a": nn.Linear(8, 12), "c": nn.Linear(12, 8), "d": nn.Linear(12, 8)})
    model.forward = lambda x: model["c"](model["a"](x)) + model["d"](model["a"](x))
    blocks, reasons = found(model, x=X)
    assert blocks == [] and reasons["a"] == "writes what several layers read: c, d"


def test_a_reader_of_something_else_at_another_time_is_left_alone():
    model = Own(lambda m, x: m.a(x).relu(), lambda h, y: y)
    after = model.after
    model.after = lambda h, y: after(h, y) + model.c(torch.ones(2, 3, 12))
    blocks, reasons = found(model, x=X)
    assert blocks == [] and "reads other features, too" in reasons["a"]


def test_of_a_chain_the_first_two_layers_are_a_block():
    chain = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    blocks, reasons = found(chain, input=X)
    assert blocks == [FeedForward("2", ("0",))]
    assert reasons["4"] == "is beside 2, which is in another feed-forward block"


def test_layers_that_must_stay_end_a_block():
    model = Own(lambda m, x: m.a(x).relu())
    model.c = LowRankLinear.from_factors(torch.ones(8, 2), torch.ones(2, 12), nn.Parameter(torch.ones(8)))
    blocks, reasons = found(model, x=X)
    assert blocks == [] and reasons["c"].startswith("is factorized already")
    tied = nn.ModuleDict({"a": nn.Linear(8, 12), "c": nn.Linear(12, 8), "other": nn.Linear(12, 8)})
    tied["other"].weight = tied["c"].weight
    tied.forward = lambda x: tied["c"](tied["a"](x))
    blocks, reasons = found(tied, x=X)
    assert blocks == [] and "shares its weight with other" in reasons["c"]


def test_the_model_is_left_as_it_was():
    model = Own(lambda m, x: m.a(x).relu()).train()
    found(model, x=X)
    assert model.training and not any(
        layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules()
    )

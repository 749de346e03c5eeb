"""Data that hold nothing, too little, or nonsense: each call says so, with the batch's number."""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from random_tensors import gaussian
from torch import nn

import lowrank
from lowrank import DataError, FewTokensWarning, StatsError, apply, calibrate, compress, plan, recover
from lowrank.calibration.collector import WIDEST
from lowrank.reports.evaluation import loss_increase


@pytest.fixture
def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    return LlamaModel(config).eval()


def sentences(count: int, real: int = 5) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows of six tokens, of which the first ones are real."""
    mask = torch.zeros(2, 6, dtype=torch.long)
    mask[:, :real] = 1
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(50, (2, 6), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


CALLS: dict[str, Callable[[nn.Module, list], object]] = {
    "calibrate": calibrate,
    "calibrate-without-loss": lambda model, data: calibrate(model, data, loss=None),
    "compress": lambda model, data: compress(model, keep=0.5, data=data),
    "sequential": lambda model, data: compress(
        model, keep=0.5, data=data, stats=calibrate(model, sentences(6)), sequential=True
    ),
    "recover": lambda model, data: recover(compress(copy.deepcopy(model), rank=4), model, data, steps=1),
    "loss_increase": lambda model, data: loss_increase(copy.deepcopy(model), model, data),
    "report": lambda model, data: lowrank.report(copy.deepcopy(model), dense=model, data=data),
}
ODD = {
    "padding-only": (sentences(1, real=0)[0], "Batch 5 is padding only: its mask is all 0"),
    "no-rows": ({key: value[:0] for key, value in sentences(1)[0].items()}, "Batch 5 is empty"),
    "no-columns": ({key: value[:, :0] for key, value in sentences(1)[0].items()}, "Batch 5 is empty"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("model_name", ["tiny_bert", "tiny_llama"])
def test_a_batch_without_a_token_is_refused_by_its_number(request, model_name, call, odd):
    model = request.getfixturevalue(model_name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, message = ODD[odd]
    with pytest.raises(DataError, match=message):
        CALLS[call](model, [*sentences(5), batch, *sentences(2)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_of_no_samples_is_refused_for_any_module(mlp):
    for empty in (gaussian(0, 64), gaussian(2, 0, 64)):
        with pytest.raises(DataError, match="Batch 1 is empty"):
            calibrate(mlp, [gaussian(50, 64), empty])


def test_a_mask_that_does_not_fit_its_tokens_is_refused(tiny_bert):
    odd = {**sentences(1)[0], "attention_mask": torch.ones(1, 6)}  # which the model takes, for both rows
    with pytest.raises(
        DataError, match=r"Batch 1: attention_mask has the shape \(1, 6\) and input_ids \(2, 6\)"
    ):
        calibrate(tiny_bert, [sentences(1)[0], odd])


def test_a_mask_of_what_the_model_shortens_is_refused():
    """As of speech: there is a value for each sample, and a hidden state for each frame."""

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, inputs_embeds, attention_mask):
            return {"last_hidden_state": self.layer(inputs_embeds[:, ::2])}

    batch = {"inputs_embeds": gaussian(2, 6, 8), "attention_mask": torch.ones(2, 6)}
    with pytest.raises(
        DataError, match=r"mask has the shape \(2, 6\), and the model's hidden states have \(2, 3, 8\)"
    ):
        calibrate(Frames(), [batch])
    assert calibrate(Frames(), [batch], loss=None).tokens == 12


@pytest.mark.parametrize("kind", ["sparse", "strided", "meta", "nested"])
def test_tensors_of_any_layout_are_read_or_refused_by_number(mlp, kind):
    plain = gaussian(50, 64)
    odd = {
        "sparse": plain.to_sparse(),
        "strided": gaussian(100)[::2][:, None].expand(50, 64),
        "meta": plain.to("meta"),
        "nested": functools.reduce(lambda inner, _: [inner], range(5000), plain),
    }[kind]
    if kind == "strided":
        assert calibrate(mlp, [plain, odd, odd[:, 0].repeat(64, 1)[:, :50].T]).tokens == 150
        return
    with pytest.raises(DataError, match="Batch 1"):
        calibrate(mlp, [plain, odd])


class Bytes:
    """A tokenizer without special tokens: an empty string has none."""

    model_max_length = 8

    def __call__(self, texts, **_):
        ids = [list(text.encode())[:8] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def test_strings_that_are_all_empty_are_refused(tiny_llama):
    with pytest.raises(DataError, match="None of the strings in data has a token"):
        calibrate(tiny_llama, [""] * 40, Bytes())


def test_tensors_inside_of_a_batch_count(mlp):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp

        def forward(self, inputs):
            return self.inner(inputs["x"][0])

    data = [{"inputs": {"x": [gaussian(50, 64, seed=i)]}} for i in range(4)]
    assert calibrate(Nested(), data).tokens == 200


def test_statistics_that_have_seen_nothing_are_refused(mlp):
    data = [gaussian(50, 64, seed=i) for i in range(4)]
    stats = calibrate(mlp, data)
    decided = plan(mlp, keep=0.5, stats=stats)
    nothing = replace(stats, tokens=0)
    for call in (
        lambda: plan(mlp, keep=0.5, stats=nothing),
        lambda: apply(mlp, decided, nothing),
        lambda: compress(mlp, keep=0.5, stats=nothing),
        lambda: lowrank.quantize(mlp, stats=nothing),
        lambda: lowrank.error_curves(mlp, stats=nothing),
    ):
        with pytest.raises(StatsError, match="have seen 0 tokens"):
            call()


def test_a_layer_that_never_gets_a_token_says_so_in_the_plan():
    """An expert that is called, but with no rows."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return torch.cat([self.used(x), self.idle(x[:0])])

    model, data = Experts(), [gaussian(50, 32, seed=i) for i in range(4)]
    for loss in ("auto", None):
        stats = calibrate(model, data, loss=loss)
        assert plan(model, keep=0.5, stats=stats)["idle"].reason == "read no token during calibration"


# --- values that are not finite


@pytest.mark.parametrize("odd", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("position", [3, 4], ids=["held-out", "trained-on"])
def test_recovery_refuses_data_that_are_not_finite_and_leaves_the_model(mlp, odd, position):
    """One batch of eight is held out, the one at position 4."""
    small = compress(copy.deepcopy(mlp), rank=4)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    data = [gaussian(20, 64, seed=i) for i in range(8)]
    data[position][3, 3] = odd
    with pytest.raises(DataError, match=f"Batch {position}: the distance of the compressed model"):
        recover(small, mlp, data, steps=20)
    assert small.state_dict().keys() == before.keys()
    if position == 4:
        assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_an_output_that_overflows_on_held_out_data_is_refused():
    """The inputs are finite, and so are their moments."""
    model = nn.Sequential(nn.Linear(8, 8)).half()
    nn.init.constant_(model[0].weight, 6e4)
    with pytest.raises(
        StatsError, match="0: what it returns in batch 0, or its gradient, is NaN or infinite"
    ):
        calibrate(model, [torch.ones(4, 8).half()] * 4, loss=None)


# --- few data


def caught(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    few = [warning for warning in found if warning.category is FewTokensWarning]
    assert all(warning.filename == __file__ for warning in few)  # the user's line, not one of the library
    return [str(warning.message) for warning in few]


def test_few_tokens_are_said_with_the_layer_and_the_numbers(mlp):
    data = [gaussian(95, 64, seed=i) for i in range(4)]
    (message,) = caught(lambda: calibrate(mlp, data))
    assert message == (
        "2: calibrated on 380 tokens, and reads 96 features. With fewer than 384 tokens the factors fit "
        "these tokens better than others. Give more data."
    )
    assert caught(lambda: calibrate(mlp, [gaussian(96, 64, seed=i) for i in range(4)])) == []
    assert caught(lambda: compress(mlp, keep=0.5, data=data)) == [message]


def test_one_batch_is_said(mlp):
    (message,) = caught(lambda: calibrate(mlp, [gaussian(400, 64)]))
    assert message.startswith("Calibration has held out no batch")
    assert caught(lambda: calibrate(mlp, [gaussian(200, 64, seed=i) for i in range(2)])) == []


def test_very_wide_inputs_of_which_only_variances_are_kept_need_no_more_tokens():
    wide = nn.Sequential(nn.Linear(WIDEST + 1, 4))
    assert (
        caught(lambda: calibrate(wide, [gaussian(4, WIDEST + 1, seed=i) for i in range(4)], loss=None)) == []
    )


def test_the_prediction_from_as_many_tokens_as_do_not_warn_holds_within_a_factor_of_two():
    """White inputs are the worst: nothing tells a direction that data lack from one that does not exist."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96))
    stats = calibrate(model, [gaussian(96, 96, seed=i) for i in range(4)], loss=None)
    decided = plan(model, keep=0.5, round_to=1, stats=stats)
    small, others = apply(copy.deepcopy(model), decided, stats), gaussian(4000, 96, seed=9)
    with torch.no_grad():
        true = (small(others) - model(others)).norm() / (model(others) - model[0].bias).norm()
    assert true / 2**0.5 < decided["0"].relative_error < true * 2**0.5


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_a_model_that_returns_nothing_is_refused_with_the_batch_s_number(shape):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x)[: shape[0], : shape[1]]

    with pytest.raises(DataError, match=r"Batch 0: the model returns a tensor of shape .* without elements"):
        lowrank.calibrate(Empty(), [torch.randn(3, 8)] * 4)

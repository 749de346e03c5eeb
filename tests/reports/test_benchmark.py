"""`benchmark` compares like with like, and leaves the models as they were."""

import copy
import json
import signal
import statistics

import pytest
import torch
from torch import nn

import lowrank
from lowrank import DataError, LowRankError, LowRankLinear
from lowrank.reports import benchmark as bench
from lowrank.reports.benchmark import peak_bytes

FAST = {"repeats": 3, "warmup": 1}


@pytest.fixture
def pair(mlp) -> tuple[nn.Module, nn.Module]:
    return mlp, lowrank.compress(copy.deepcopy(mlp), rank={"0": 8, "2": 16})


def test_each_layer_states_the_speedup_of_theory(pair):
    result = lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)
    assert [(row.name, row.rank) for row in result.layers] == [("0", 8), ("2", 16)]
    for row in result.layers:
        assert row.theoretical_speedup == pytest.approx(64 * 96 / (row.rank * (64 + 96)))
    assert result.model.theoretical_speedup == pytest.approx(2 * 64 * 96 / (24 * (64 + 96)))
    assert result.model.name == "" and result.model.rank is None


def test_a_model_without_any_parameter_is_measured():
    dense = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU()).to(torch.float64)
    small = lowrank.quantize(lowrank.compress(copy.deepcopy(dense), rank=8))
    assert not list(small.parameters())
    result = lowrank.benchmark(dense, small, torch.zeros(4, 64, dtype=torch.float64), **FAST)
    assert result.environment["dtype"] == "float64"


def test_theory_counts_conv1d_layers_as_well():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=99, n_positions=64)
    dense = transformers.GPT2Model(config)
    small = lowrank.compress(copy.deepcopy(dense), rank=8, targets=["*.c_fc"])
    result = lowrank.benchmark(dense, small, {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, **FAST)
    others = 64 * 192 + 64 * 64 + 256 * 64  # c_attn, attn.c_proj, mlp.c_proj
    expected = (others + 64 * 256) / (others + 8 * (64 + 256))
    assert result.model.theoretical_speedup == pytest.approx(expected)


def test_times_are_medians_of_interleaved_runs_without_the_warmup(pair, monkeypatch):
    dense, small = pair
    whole, clock = [], iter(range(1, 1000))

    def seconds(call, device):
        model = call.args[0]
        tick = float(next(clock)) ** 2
        if model in pair:
            whole.append((model, tick))
        return tick

    monkeypatch.setattr(bench, "timed", seconds)
    result = lowrank.benchmark(dense, small, torch.zeros(4, 64), repeats=5, warmup=2)
    assert [model for model, _ in whole] == [dense, small] * 7
    times = {model: [t for m, t in whole if m is model][2:] for model in pair}
    assert result.model.seconds_dense == statistics.median(times[dense])
    assert result.model.seconds_small == statistics.median(times[small])
    assert result.model.speedup == result.model.seconds_dense / result.model.seconds_small


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_training_modes_come_back(pair, mode):
    for model in pair:
        model.train(mode)
    pair[1][0].train(not mode)
    before = [module.training for model in pair for module in model.modules()]
    lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)
    assert [module.training for model in pair for module in model.modules()] == before


def test_the_models_run_in_evaluation_mode_and_without_gradients(pair):
    seen = []
    handle = pair[1][1].register_forward_hook(
        lambda m, a, o: seen.append((m.training, torch.is_grad_enabled()))
    )
    pair[1].train()
    lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)
    handle.remove()
    assert set(seen) == {(False, False)}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_only_its_own_hooks_are_removed(pair):
    seen = []
    pair[0][0].register_forward_pre_hook(lambda module, args: seen.append(module))
    lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)
    assert [hooks(model) for model in pair] == [1, 0]
    assert seen


def test_hooks_go_and_modes_come_back_when_a_forward_raises(pair):
    for model in pair:
        model.train()
    with pytest.raises(
        DataError, match=r"dense \(Sequential\) refuses the inputs: .*shapes cannot be multiplied"
    ):
        lowrank.benchmark(*pair, torch.zeros(4, 65), **FAST)
    assert [hooks(model) for model in pair] == [0, 0]
    assert all(module.training for model in pair for module in model.modules())


def test_the_models_and_the_random_state_are_not_changed(pair):
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in pair]
    state = torch.get_rng_state()
    lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)
    for tensors, model in zip(before, pair, strict=True):
        assert all(torch.equal(tensors[n], t) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Chain(nn.Module):
    """A first tensor that is freed, or kept, when the third is made."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x):
        first = x + 1
        second = first * 2
        if not self.keep:
            del first
        return second + 3


@pytest.mark.parametrize(("keep", "alive"), [(False, 2), (True, 3)], ids=["freed", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_peak_bytes_of_known_operations_are_exact(keep, alive, dtype):
    x = torch.zeros(1000, dtype=dtype)
    assert peak_bytes(Chain(keep), (x,)) == alive * 1000 * x.element_size()


def test_a_view_and_an_operation_in_place_need_no_memory():
    class Views(nn.Module):
        def forward(self, x):
            y = x + 1
            return y.view(10, 100).T[2:].mul_(3)

    assert peak_bytes(Views(), (torch.zeros(1000),)) == 4000


def test_peak_bytes_of_a_linear_layer_are_its_outputs(pair):
    dense, small = pair
    assert peak_bytes(dense[0], (torch.zeros(4, 64),)) == 4 * 4 * 96
    assert peak_bytes(small[0], (torch.zeros(4, 64),)) == 4 * 4 * (8 + 96)


def test_peak_bytes_reach_the_result(pair):
    result = lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)
    assert result.layers[0].peak_bytes_dense == 4 * 4 * 96
    assert result.layers[0].peak_bytes_small == 4 * 4 * (8 + 96)


INPUTS = {
    "tensor": torch.zeros(4, 64),
    "tuple": (torch.zeros(4, 64),),
    "list": [torch.zeros(4, 64)],
    "mapping": {"input": torch.zeros(4, 64)},
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_inputs_are_given_as_the_model_takes_them(pair, inputs):
    assert len(lowrank.benchmark(*pair, inputs, **FAST).layers) == 2


def test_a_tokenizers_output_is_taken(tiny_bert):
    from transformers import BatchEncoding

    small = lowrank.compress(copy.deepcopy(tiny_bert), rank=8)
    batch = BatchEncoding({"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    result = lowrank.benchmark(tiny_bert, small, batch, **FAST)
    assert len(result.layers) == sum(isinstance(m, LowRankLinear) for m in small.modules()) == 12


def test_a_layer_that_the_forward_does_not_run_has_no_row(tiny_bert):
    class First(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    dense = First(nn.Linear(64, 64), nn.Linear(64, 64))
    result = lowrank.benchmark(
        dense, lowrank.compress(copy.deepcopy(dense), rank=8), torch.zeros(2, 64), **FAST
    )
    assert [row.name for row in result.layers] == ["0"]


def test_a_layer_called_by_keyword_is_measured():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(input=x)

    dense = Keyword()
    result = lowrank.benchmark(
        dense, lowrank.compress(copy.deepcopy(dense), rank=8), torch.zeros(2, 64), **FAST
    )
    assert [row.name for row in result.layers] == ["layer"]


def test_the_same_dense_model_twice_is_refused(mlp):
    with pytest.raises(LowRankError, match=r"second model has no factorized layer"):
        lowrank.benchmark(mlp, mlp, torch.zeros(4, 64), **FAST)


def test_models_in_the_wrong_order_are_refused(pair):
    with pytest.raises(LowRankError, match=r"second model has no factorized layer"):
        lowrank.benchmark(pair[1], pair[0], torch.zeros(4, 64), **FAST)


def test_another_dense_model_is_refused_by_layer_name(pair):
    with pytest.raises(LowRankError, match=r"^2: the dense model has no such layer"):
        lowrank.benchmark(nn.Sequential(nn.Linear(64, 96)), pair[1], torch.zeros(4, 64), **FAST)


def test_models_on_different_devices_are_refused(pair):
    with pytest.raises(LowRankError, match="different devices: meta and cpu"):
        lowrank.benchmark(copy.deepcopy(pair[0]).to("meta"), pair[1], torch.zeros(4, 64), **FAST)


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"repeats": -1}, {"warmup": -1}], ids=str)
def test_impossible_repetitions_are_refused(pair, bad):
    with pytest.raises(LowRankError, match=next(iter(bad))):
        lowrank.benchmark(*pair, torch.zeros(4, 64), **{**FAST, **bad})


def test_json_has_every_row_and_the_environment(pair):
    result = lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)
    data = json.loads(result.to_json())
    assert data["environment"]["torch"] == torch.__version__
    assert data["environment"]["threads"] == torch.get_num_threads()
    assert data["environment"]["dtype"] == "float32"
    assert data["environment"]["device"].startswith("cpu")
    assert data["environment"]["repeats"] == 3
    assert [row["name"] for row in data["layers"]] == ["0", "2"]
    assert data["model"]["speedup"] == result.model.speedup


def test_the_table_has_a_row_per_layer_and_one_for_the_model(pair):
    lines = str(lowrank.benchmark(*pair, torch.zeros(4, 64), **FAST)).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["0", "2", "whole"]
    assert "4.80×" in lines[2]
    assert "threads" in lines[-1]


def test_integer_weights_count_as_the_products_that_they_are(tiny_bert):
    small = lowrank.compress(copy.deepcopy(tiny_bert), rank=16)
    inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    floating = lowrank.benchmark(tiny_bert, small, inputs, repeats=1, warmup=0).model.theoretical_speedup
    coded = lowrank.benchmark(
        tiny_bert, lowrank.quantize(small), inputs, repeats=1, warmup=0
    ).model.theoretical_speedup
    assert coded == floating


@pytest.mark.parametrize("at", range(2), ids=["first", "last"])
@pytest.mark.parametrize("when", ["registered", "removed"])
def test_ctrl_c_while_hooks_come_or_go_leaves_none(pair, monkeypatch, when, at):
    """The interrupt is one that Python delivers: it waits until the hooks are known, or gone."""
    dense, small = pair
    register, calls = nn.Module.register_forward_pre_hook, iter(range(99))

    class Removing:
        def __init__(self, handle):
            self.handle = handle

        def remove(self):
            self.handle.remove()
            if when == "removed" and next(calls) == at:
                signal.raise_signal(signal.SIGINT)

    def interrupted(module, hook, **options):
        handle = register(module, hook, **options)
        if when == "registered" and next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return Removing(handle)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", interrupted)
    dense.train()
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            lowrank.benchmark(dense, small, torch.zeros(4, 64), **FAST)
    finally:
        signal.signal(signal.SIGINT, old)
    assert not any(module._forward_pre_hooks for module in dense.modules())
    assert dense.training

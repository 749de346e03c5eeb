"""What a new layer takes over from the old one: hooks, flags, the bias."""

import copy
import gc

import pytest
import torch
from torch import nn

from lowrank import compress, decompress, quantize
from lowrank.surgery.inheritance import HOOKS as PLACES_OF_HOOKS

HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(lambda *_: hook()),
    "forward-with-kwargs": lambda layer, hook: layer.register_forward_hook(
        lambda module, args, kwargs, output: hook(), with_kwargs=True
    ),
    "forward-always": lambda layer, hook: layer.register_forward_hook(lambda *_: hook(), always_call=True),
    "pre-forward": lambda layer, hook: layer.register_forward_pre_hook(lambda *_: hook()),
    "pre-forward-with-kwargs": lambda layer, hook: layer.register_forward_pre_hook(
        lambda module, args, kwargs: hook(), with_kwargs=True
    ),
    "backward": lambda layer, hook: layer.register_full_backward_hook(lambda *_: hook()),
    "pre-backward": lambda layer, hook: layer.register_full_backward_pre_hook(lambda *_: hook()),
}

STATE_HOOKS = {
    "save-pre": lambda layer, hook: layer.register_state_dict_pre_hook(lambda *_: hook()),
    "save-post": lambda layer, hook: layer.register_state_dict_post_hook(lambda *_: hook()),
    "load-pre": lambda layer, hook: layer.register_load_state_dict_pre_hook(lambda *_: hook()),
    "load-post": lambda layer, hook: layer.register_load_state_dict_post_hook(lambda *_: hook()),
}


@pytest.mark.parametrize("there_and_back", [False, True], ids=["compressed", "decompressed"])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_stay_and_their_handles_still_remove_them(mlp, register, there_and_back):
    calls = []
    handle = register(mlp[2], lambda: calls.append(1))
    compress(mlp, rank=8)
    if there_and_back:
        decompress(mlp)

    def step() -> int:
        before = len(calls)
        mlp(torch.ones(3, 64, requires_grad=True)).sum().backward()
        return len(calls) - before

    assert step() == 1
    handle.remove()
    assert step() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: compress(model, rank=8),
        lambda model: decompress(compress(model, rank=8)),
        quantize,
        lambda model: decompress(quantize(model)),
        lambda model: compress(model, rank=8, quantize="int8"),
    ],
    ids=["compressed", "decompressed", "quantized", "dequantized", "both"],
)
@pytest.mark.parametrize("register", STATE_HOOKS.values(), ids=STATE_HOOKS)
def test_hooks_on_the_state_dict_stay_and_their_handles_still_remove_them(mlp, register, change):
    calls = []
    handle = register(mlp[2], lambda: calls.append(1))
    change(mlp)
    gc.collect()  # a hook on loading must not ask for the layer that it was registered on
    calls.clear()
    mlp.load_state_dict(mlp.state_dict())
    assert calls == [1]
    handle.remove()
    mlp.load_state_dict(mlp.state_dict())
    assert calls == [1]


def test_a_hook_on_loading_is_called_with_the_layer_that_is_there_now(mlp):
    seen = []
    mlp[2].register_load_state_dict_pre_hook(lambda layer, *_: seen.append(layer))
    compress(mlp, rank=8)
    mlp.load_state_dict(mlp.state_dict())
    assert seen == [mlp[2]]


def test_every_place_where_pytorch_keeps_hooks_is_known():
    assert {"_state_dict_hooks", "_load_state_dict_pre_hooks", "_forward_hooks"} < set(PLACES_OF_HOOKS)


@pytest.mark.parametrize(
    "compressed",
    [quantize, lambda model: compress(model, rank=8, quantize="int8"), lambda model: compress(model, rank=8)],
    ids=["quantized", "quantized-factors", "factors"],
)
def test_a_frozen_weight_is_frozen_still_when_it_is_dense_again(mlp, compressed):
    model = nn.Sequential(mlp, nn.Embedding(16, 64))
    mlp[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    copy.deepcopy(decompress(compressed(model)))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {
        "0.0.weight": False, "0.0.bias": True, "0.2.weight": True, "0.2.bias": True, "1.weight": False,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["equal", "tied"])
def test_a_frozen_copy_is_frozen_still_when_it_is_dense_again(tied):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[0].weight if tied else nn.Parameter(model[0].weight.detach().clone(), False)
    before = [model[0].weight.requires_grad, model[2].weight.requires_grad]
    decompress(compress(model, rank=4))
    assert [model[0].weight.requires_grad, model[2].weight.requires_grad] == before


def test_a_bias_that_is_added_to_a_frozen_layer_is_frozen():
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).requires_grad_(False)
    data = [torch.randn(40, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    compress(model, rank=4, data=data, loss=None, add_bias=True)
    assert model[0].added_bias
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_frozen_weights_stay_frozen_and_others_trainable(mlp):
    mlp[0].weight.requires_grad_(False)
    mlp[2].bias.requires_grad_(False)
    compress(mlp, rank=8)
    flags = {name: p.requires_grad for name, p in mlp.named_parameters()}
    assert flags == {
        "0.down.weight": False, "0.up.weight": False, "0.up.bias": True,
        "2.down.weight": True, "2.up.weight": True, "2.up.bias": False,
    }  # fmt: skip
    decompress(mlp)
    flags = {name: p.requires_grad for name, p in mlp.named_parameters()}
    assert flags == {"0.weight": False, "0.bias": True, "2.weight": True, "2.bias": False}


def test_training_flags_stay_layer_by_layer(mlp):
    mlp.train()
    mlp[2].eval()
    compress(mlp, rank=8)
    assert [module.training for module in (mlp, mlp[0], mlp[0].up, mlp[2], mlp[2].down)] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_the_bias_is_the_same_parameter_and_none_stays_none():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    bias = model[0].bias
    compress(model, rank=8)
    assert model[0].bias is bias
    assert model[1].bias is None
    decompress(model)
    assert model[0].bias is bias
    assert model[1].bias is None

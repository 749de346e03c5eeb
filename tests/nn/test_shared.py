"""One `down` for several layers: computed once, and never a wrong result for it."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import LowRankLinear


class Attention(nn.Module):
    """Three layers that read the same input, as queries, keys and values do."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (LowRankLinear(16, 12, 5, shared=shared) for _ in range(3))
        for other in (self.key, self.value):
            if shared:
                other.share_down_with(self.query)
            else:
                other.down.weight = self.query.down.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x) + 2 * self.key(x).tanh() + 3 * self.value(x)


@pytest.fixture
def products(monkeypatch):
    """Count how often a shared `down` is really computed."""
    count = []
    original = lowrank.nn.shared.linear

    def counting(input, weight):
        count.append(weight)
        return original(input, weight)

    monkeypatch.setattr(lowrank.nn.shared, "linear", counting)
    return count


def test_down_is_computed_once_per_forward_pass(products):
    model, x = Attention(), torch.randn(4, 16)
    for passes in (1, 2, 3):
        model(x)
        assert len(products) == passes


def test_outputs_and_gradients_are_those_without_sharing():
    one, three, x = Attention(), Attention(shared=False), torch.randn(4, 16)
    three.load_state_dict(one.state_dict(), strict=False)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    first, second = one(a), three(b)
    assert torch.equal(first, second)
    first.sum().backward()
    second.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(one.query.down.weight.grad, three.query.down.weight.grad)


def test_the_parameters_belong_to_the_owner_alone():
    model = Attention()
    names = {name for name, _ in model.named_parameters()}
    assert "query.down.weight" in names and "key.down.weight" not in names
    assert sum(p.numel() for p in model.parameters()) == 5 * 16 + 3 * (12 * 5 + 12)
    assert model.query.macs + model.key.macs == 5 * (16 + 12) + 5 * 12
    assert "shared down" in repr(model.key)


@pytest.mark.parametrize("change", ["input", "weight", "mode", "autocast"])
def test_what_has_changed_between_two_layers_is_computed_anew(change, products):
    model, x = Attention(), torch.randn(4, 16)
    with torch.no_grad():
        model.query(x)
        if change == "input":
            x.mul_(2)
        elif change == "weight":
            model.query.down.weight.mul_(2)
    grad = change == "mode"
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        got = model.key(x)
        expected = model.key.up(nn.functional.linear(x, model.query.down.weight))
    assert torch.equal(got, expected) and got.requires_grad == grad
    assert len(products) == 2


def test_a_graph_that_is_used_up_is_not_used_again():
    model, x = Attention(), torch.randn(4, 16)
    model.query(x).sum().backward()
    model.key(x).sum().backward()
    model.value(x).sum().backward()
    assert model.query.down.weight.grad is not None


def test_inference_mode_keeps_nothing(products):
    """Its tensors do not count changes in place, so a result could be out of date unseen."""
    model, x = Attention(), torch.randn(4, 16)
    with torch.inference_mode():
        y = x * 1
        first = model.query(y)
        y.mul_(2)
        torch.testing.assert_close(model.query(y) - model.query.bias, 2 * (first - model.query.bias))
        model(y)
    assert len(products) == 5


def test_threads_do_not_see_each_others_results():
    model = Attention()
    inputs = [torch.randn(4, 16) for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(inputs[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, x = Attention(), torch.randn(4, 16, requires_grad=True)
    model(x).sum().backward()
    expected, model.query.down.weight.grad = model.query.down.weight.grad, None
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(model.query.down.weight.grad, expected)


def test_a_copy_shares_within_itself():
    model = Attention()
    twin = copy.deepcopy(model)
    assert twin.key.down is twin.query.down is not model.query.down
    with torch.no_grad():
        twin.query.down.weight.zero_()
    x = torch.randn(4, 16)
    assert not torch.equal(twin(x), model(x))


def test_state_dict_device_and_dtype_work_as_ever():
    model, other = Attention(), Attention()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(model(x), other(x))
    assert other.double()(x.double()).dtype == torch.float64


def test_compile_and_export_see_plain_products():
    model, x = Attention().eval(), torch.randn(4, 16)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)

"""`PivotedUp`: one function, however it computes it."""

import copy

import pytest
import torch
from torch import nn

from lowrank.errors import CheckpointError, RankError
from lowrank.linalg.pivots import pivots
from lowrank.nn import LowRankLinear, PivotedUp

RANK, OUT = 8, 24


@pytest.fixture
def up():
    torch.manual_seed(0)
    found = pivots(torch.randn(OUT, RANK), torch.randn(RANK, 16))
    return PivotedUp.from_pivots(found, nn.Parameter(torch.randn(OUT)))


def reference(up, z):
    return torch.cat([z, z @ up.rest.weight.T], -1)[..., up.order.long()] + up.bias


@pytest.mark.parametrize("shape", [(RANK,), (1, RANK), (3, 2, RANK), (64, RANK), (4, 16, RANK)])
def test_few_and_many_tokens_give_the_same(up, shape):
    z = torch.randn(shape)
    # Both sum the same products in another order: a few roundings of numbers of size 10.
    torch.testing.assert_close(up(z), reference(up, z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 64])
def test_gradients_are_those_of_the_definition(up, tokens):
    twin, z = copy.deepcopy(up), torch.randn(tokens, RANK, requires_grad=True)
    y = torch.randn(tokens, OUT)
    (up(z) * y).sum().backward()
    found, z.grad = z.grad, None
    (reference(twin, z) * y).sum().backward()
    torch.testing.assert_close(found, z.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(up.rest.weight.grad, twin.rest.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(up.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)


def test_a_change_of_the_weight_is_seen_at_once(up):
    z = torch.randn(64, RANK)
    before = up(z)
    up.rest.weight.data.mul_(2)  # which leaves no trace in a version counter
    torch.testing.assert_close(up(z), reference(up, z), rtol=1e-5, atol=1e-5)
    assert (up(z) - before).norm() > 0.1 * before.norm()


def test_a_hook_on_the_inner_layer_is_called(up):
    seen = []
    up.rest.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    up(torch.randn(64, RANK))
    assert seen == [(64, OUT - RANK)]


def test_compiled_and_exported_programs_give_the_same(up):
    z = torch.randn(40, RANK)
    exported = torch.export.export(up.eval(), (z,)).module()
    torch.testing.assert_close(exported(z), up(z), rtol=1e-5, atol=1e-5)


def test_a_layer_counts_what_it_stores(up):
    assert up.stored_bytes == 4 * RANK * (OUT - RANK) + 4 * OUT
    assert up.weight.shape == (OUT, RANK)


def test_pivots_that_leave_nothing_to_compute_are_refused():
    with pytest.raises(RankError, match="leaves none to compute"):
        PivotedUp(8, 8)


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(CheckpointError, match="is no order of 3 outputs"):
        PivotedUp.check_stored("file", "layer.up", torch.tensor(order, dtype=torch.int32))


def test_a_low_rank_layer_with_pivots_multiplies_back():
    torch.manual_seed(0)
    layer = LowRankLinear.from_linear(nn.Linear(16, OUT), RANK)
    weight = layer.dense_weight().detach()
    found = pivots(layer.up.weight.detach(), layer.down.weight.detach())
    layer.down.weight = nn.Parameter(found.rows)
    layer.up = PivotedUp.from_pivots(found, layer.bias)
    torch.testing.assert_close(layer.dense_weight().detach(), weight, rtol=1e-5, atol=1e-6)

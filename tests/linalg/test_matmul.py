"""Products: the same numbers, derivatives and transforms, whichever library computes them."""

import pytest
import torch
from closeness import LAYERS32, SUMS32
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812

from lowrank.linalg import linear, matmul, product

onednn = pytest.mark.skipif(not matmul.AVAILABLE, reason="oneDNN is not the faster library here")


@pytest.fixture
def calls(monkeypatch):
    """Count how often oneDNN is called."""
    counted, real = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: counted.append(1) or real(*a))
    return counted


def tensors(*shape, rows=32, out=24, inner=40, bias=True, **options):
    generator = torch.Generator().manual_seed(0)
    make = lambda *size: torch.randn(size, generator=generator, **options)  # noqa: E731
    return make(*(shape or (rows, inner))), make(out, inner), make(out) if bias else None


@given(
    shape=st.lists(st.integers(0, 20), min_size=0, max_size=3),
    inner=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
)
def test_any_shape_gives_what_pytorch_gives(shape, inner, out, bias):
    x, w, b = tensors(*shape, inner, inner=inner, out=out, bias=bias)
    torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b), rtol=SUMS32, atol=SUMS32)


@given(
    rows=st.integers(1, 60),
    inner=st.integers(1, 60),
    columns=st.integers(1, 60),
    gaps=st.tuples(st.booleans(), st.booleans()),
    turned=st.tuples(st.booleans(), st.booleans()),
)
def test_matrices_may_lie_in_any_way(rows, inner, columns, gaps, turned):
    def lying(m, n, gap, turn):
        return (
            torch.randn(n, 2 * m)[:, ::2].T
            if gap and turn
            else torch.randn(m, 2 * n)[:, : n if gap else None][:, :n]
        )

    left, right = lying(rows, inner, gaps[0], turned[0]), lying(inner, columns, gaps[1], turned[1])
    torch.testing.assert_close(product(left, right), left @ right, rtol=SUMS32, atol=SUMS32)


@onednn
def test_onednn_is_used_with_and_without_gradients_to_the_same_bits(calls):
    x, w, b = tensors()
    plain = linear(x, w, b)
    with_gradient = linear(x, w.requires_grad_(), b)
    assert len(calls) == 2
    assert torch.equal(plain, with_gradient.detach())
    assert with_gradient.requires_grad


@pytest.mark.parametrize("shape", [(32, 40), (4, 8, 40)])
@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_gradients_are_those_of_pytorch(shape, needed):
    found = []
    for function in (linear, F.linear):
        leaves = [t.requires_grad_(bool(n)) for t, n in zip(tensors(*shape), needed, strict=True)]
        function(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=LAYERS32, atol=LAYERS32)


def test_gradients_of_gradients():
    found = []
    for function in (linear, F.linear):
        x, w, b = (t.requires_grad_() for t in tensors())
        (first,) = torch.autograd.grad(function(x, w, b).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, w, b]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours / theirs.norm(), theirs / theirs.norm(), rtol=LAYERS32, atol=LAYERS32)


def test_forward_mode_derivatives():
    x, w, b = tensors()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, torch.ones_like(x)), w, b)).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ w.T)


def test_functional_transforms():
    x, w, b = tensors()
    batched = torch.func.vmap(lambda row: linear(row.expand(32, -1), w, b))(x)
    torch.testing.assert_close(batched[:, 0], F.linear(x, w, b))
    slope = torch.func.grad(lambda given: linear(x, given, b).sum())(w)
    torch.testing.assert_close(slope, x.sum(0).expand_as(w), rtol=LAYERS32, atol=LAYERS32)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda x, w, b: (x[:8], w, b), {}),
        (lambda x, w, b: (x.double(), w.double(), b.double()), {}),
        (lambda x, w, b: (x.bfloat16(), w.bfloat16(), b.bfloat16()), {}),
        (lambda x, w, b: (x[:, ::2], w[:, ::2], b), {}),
        (lambda x, w, b: (x, w.to("meta"), b), {"meta": True}),
    ],
    ids=["few rows", "float64", "bfloat16", "gaps", "meta"],
)
def test_what_onednn_does_not_do_well_is_left_to_pytorch(calls, change, options):
    x, w, b = change(*tensors())
    if options.get("meta"):
        x, b = x.to("meta"), b.to("meta")
    assert linear(x, w, b).shape == (len(x), 24)
    assert not calls


def test_whoever_watches_pytorchs_operators_sees_them(calls):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        linear(*tensors())
    assert counter.get_total_flops() == 2 * 32 * 24 * 40
    traced = torch.jit.trace(lambda x, w: linear(x, w), tensors(bias=False)[:2], check_trace=False)
    assert "aten::linear" in str(traced.graph)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(*tensors())
    with torch.autocast("cpu"):
        assert linear(*tensors()).dtype == torch.bfloat16
    assert not calls


def test_other_weights_than_plain_ones_are_pytorchs_business(calls):
    class Watched(torch.Tensor):
        pass

    x, w, b = tensors()
    torch.testing.assert_close(linear(x, w.as_subclass(Watched), b), F.linear(x, w, b))
    torch.testing.assert_close(linear(x, w, b[:1]), F.linear(x, w, b[:1]))
    with pytest.raises(RuntimeError, match="shapes"):
        linear(x[:, :8].contiguous(), w, b)
    assert not calls


def test_an_output_that_is_trained_may_be_changed_in_place():
    """As Falcon does: ``mlp_output += attention_output``."""
    weight = torch.nn.Parameter(torch.randn(24, 32))
    inputs = torch.randn(4, 16, 32)
    output = linear(inputs, weight)
    output += 1
    output.square().sum().backward()
    expected = torch.nn.Parameter(weight.detach().clone())
    (torch.nn.functional.linear(inputs, expected) + 1).square().sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-3)  # sums of 64 terms near 100

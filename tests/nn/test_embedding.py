"""`LowRankEmbedding` and `TiedLinear`: the modules, by themselves."""

import copy
import pickle

import pytest
import torch
from random_tensors import gaussian
from torch import nn

from lowrank.errors import RankError
from lowrank.linalg import Scheme
from lowrank.nn import LowRankEmbedding, QuantizedEmbedding, QuantizedLinear, TiedLinear

ROWS, WIDTH, RANK = 50, 64, 32


def table(bias: bool = False, padding_idx: int | None = None) -> LowRankEmbedding:
    row = nn.Parameter(gaussian(WIDTH, seed=2)) if bias else None
    factors = gaussian(ROWS, RANK), gaussian(RANK, WIDTH, seed=1)
    return LowRankEmbedding.from_factors(*factors, row, padding_idx=padding_idx)


def coded_parts(scheme: str, bias: bool) -> LowRankEmbedding:
    made = table(bias)
    made.down = QuantizedEmbedding.from_embedding(made.down, Scheme(scheme))
    made.up = QuantizedLinear.from_weight(made.up.weight, made.up.bias, Scheme(scheme))
    return made


def coded(owner: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLinear) for module in owner.modules())


OWNERS = {
    "factors": table,
    "factors-centred": lambda: table(bias=True),
    "int8-factors": lambda: coded_parts("int8", bias=False),
    "int4-factors-centred": lambda: coded_parts("int4", bias=True),
    "int8": lambda: QuantizedEmbedding.from_embedding(nn.Embedding(ROWS, WIDTH), Scheme("int8")),
    "int4": lambda: QuantizedEmbedding.from_embedding(nn.Embedding(ROWS, WIDTH), Scheme("int4")),
}
every_owner = pytest.mark.parametrize("make", OWNERS.values(), ids=OWNERS.keys())


@every_owner
def test_rows_and_outputs_are_those_of_one_dense_table(make):
    owner = make()
    dense = owner.dense_weight().detach()
    ids, hidden = torch.arange(ROWS).reshape(5, 10), gaussian(3, 7, WIDTH)
    head = TiedLinear(owner, nn.Parameter(gaussian(ROWS, seed=3)))
    with torch.no_grad():
        # a quantized second factor reads a row or two at a time through kernels that round what they read
        assert (owner(ids) - dense[ids]).norm() < (0.01 if coded(owner) else 1e-5) * dense.norm()
        exact = hidden @ dense.T + head.bias
        error = (head(hidden) - exact).norm() / exact.norm()
    assert head(hidden).shape == (3, 7, ROWS)
    assert error < (0.02 if head.runs_on() == "int8" else 1e-5)  # int8 quantizes what it reads, too


@pytest.mark.parametrize("rank", [0, 33, 1.5, True], ids=["zero", "above-both", "fraction", "truth"])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(RankError, match=r"rank .* of an embedding of 40 rows of 32: .* from 1 to 32"):
        LowRankEmbedding(40, 32, rank)


@every_owner
def test_a_tied_layer_owns_nothing_but_its_bias(make):
    head = TiedLinear(make(), nn.Parameter(torch.zeros(ROWS)))
    assert [name for name, _ in head.named_parameters()] == ["bias"]
    assert {name: tuple(x.shape) for name, x in head.state_dict().items()} == {
        "weight": (ROWS, 0),
        "bias": (ROWS,),
    }
    assert [name for name, _ in TiedLinear(make()).named_parameters()] == []


@every_owner
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_uses_the_copied_table(make, again):
    owner = make()
    model = nn.ModuleDict({"embedding": owner, "head": TiedLinear(owner)})
    model["head"](gaussian(2, WIDTH))  # whatever it keeps is copied along
    twin = again(model)
    assert twin["head"].owner is twin["embedding"]
    assert twin["embedding"] is not owner
    assert torch.equal(twin["head"](gaussian(2, WIDTH)), model["head"](gaussian(2, WIDTH)))


def test_other_codes_are_used_at_once():
    one, other = (QuantizedEmbedding.from_embedding(nn.Embedding(ROWS, WIDTH), Scheme("int8")) for _ in "ab")
    head = TiedLinear(one)
    before = head(gaussian(20, WIDTH))
    one.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(head(gaussian(20, WIDTH)), TiedLinear(other)(gaussian(20, WIDTH)))
    assert not torch.equal(head(gaussian(20, WIDTH)), before)


def test_both_uses_move_the_factors():
    owner = table()
    head = TiedLinear(owner)
    (owner(torch.tensor([1])).sum() + head(gaussian(2, WIDTH)).sum()).backward()
    by_rows = owner.down.weight.grad.abs().sum(1)
    assert bool((by_rows > 0).all())  # the head reads every row, the input one of them
    alone = table()
    alone(torch.tensor([1])).sum().backward()
    assert (alone.down.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [1]


def test_half_precision_is_computed_in():
    owner = coded_parts("int8", bias=True)
    model = nn.ModuleDict({"embedding": owner, "head": TiedLinear(owner)}).to(torch.bfloat16)
    assert model["embedding"](torch.tensor([1])).dtype == torch.bfloat16
    assert model["head"](gaussian(2, WIDTH).to(torch.bfloat16)).dtype == torch.bfloat16
    assert owner.down.codes.dtype == torch.int8


def test_padding_has_no_gradient():
    owner = table(padding_idx=3)
    owner(torch.tensor([3, 4])).sum().backward()
    moved = owner.down.weight.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [4]


@every_owner
def test_it_compiles_to_the_same(make):
    owner = make()
    model = nn.Sequential(owner, TiedLinear(owner))
    ids = torch.arange(24)
    with torch.no_grad():
        expected = model(ids)
        found = torch.compile(model, backend="eager")(ids)
    assert (found - expected).norm() < 0.03 * expected.norm()  # compiled, codes are dequantized

"""Where autocast is on, weights and statistics are computed as they are without it."""

import pytest
import torch
from closeness import CANCELLED32, SUMS32
from torch import nn

import lowrank


class Blocks(nn.Module):
    """A table and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 48)
        layers = (nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(2))
        self.blocks = nn.ModuleList(layers)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def blocks() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Blocks().eval()


def ids(seed: int) -> torch.Tensor:
    return torch.randint(30, (16, 6), generator=torch.Generator().manual_seed(seed))


CALLS = {
    "rank": lambda model: lowrank.compress(model, rank=8),
    "keep": lambda model: lowrank.compress(model, keep=0.5),
    "shared": lambda model: lowrank.compress(model, rank=8, share="layers"),
    "embeddings": lambda model: lowrank.compress(model, rank=8, targets=["*embed*", "*.0"]),
    "int8": lambda model: lowrank.quantize(model),
    "correction": lambda model: lowrank.compress(model, rank=8, quantize="int8", correction=True),
    "calibrated": lambda model: lowrank.compress(model, keep=0.5, stats=STATS),
    "calibrated-int8": lambda model: lowrank.compress(model, rank=8, stats=STATS, quantize="int8"),
    "decompressed": lambda model: lowrank.decompress(lowrank.compress(model, rank=8, stats=STATS)),
    "decompressed-int8": lambda model: lowrank.decompress(
        lowrank.compress(model, rank=8, stats=STATS, quantize="int8")
    ),
    "decompressed-table": lambda model: lowrank.decompress(
        lowrank.compress(model, rank=8, targets=["embed"])
    ),
}
STATS = lowrank.calibrate(blocks(), [ids(seed) for seed in range(8)])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_same_weights_come_out(call):
    plain, under = blocks(), blocks()
    call(plain)
    with torch.autocast("cpu", torch.bfloat16):
        call(under)
    expected, found = plain.state_dict(), under.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_statistics_are_those_of_what_layers_read():
    model = nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 48)).eval()
    data = [torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    with torch.autocast("cpu", torch.bfloat16):
        stats = lowrank.calibrate(model, data)
    rows = torch.cat(data).double()
    moments = stats.moments("0")
    torch.testing.assert_close(moments.products, rows.T @ rows, rtol=SUMS32, atol=CANCELLED32)


def test_a_weight_that_is_asked_for_is_exact():
    layer = lowrank.compress(blocks(), rank=8).blocks[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.dense_weight()
    assert torch.equal(found, layer.up.weight @ layer.down.weight)

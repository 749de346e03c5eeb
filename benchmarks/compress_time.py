"""Time ``compress(BertModel(BertConfig()), rank=100)`` beside a loop of ``torch.linalg.svd``.

The goal: at most a quarter of the time, every layer within 0.1 % of the optimal error.
"""

from __future__ import annotations

import copy

import torch
from common import finish, interleaved_medians, parser
from transformers import BertConfig, BertModel

from lowrank import LowRankLinear, compress, plan

RANK = 100


def svd_loop(weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factor as everybody starts: one full SVD per layer, truncated."""
    factors = []
    for weight in weights:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        factors.append((left[:, :RANK] * values[:RANK], right[:RANK]))
    return factors


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()

    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    names = [layer.name for layer in plan(model, rank=RANK).factorized]
    dense = {name: model.get_submodule(name).weight.detach() for name in names}
    copies = [copy.deepcopy(model) for _ in range(options.repeats + 1)]
    seconds = interleaved_medians(
        {
            "compress": lambda: compress(copies.pop(), rank=RANK),
            "svd_loop": lambda: svd_loop(list(dense.values())),
        },
        options.repeats,
    )
    small = compress(model, rank=RANK)
    excess = []
    for name, weight in dense.items():
        layer = small.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        error = torch.linalg.matrix_norm(weight.double() - layer.dense_weight().detach().double())
        optimum = torch.linalg.svdvals(weight.double())[RANK:].square().sum().sqrt()
        excess.append(float(error / optimum) - 1)
    finish(
        "compress_time",
        {
            "layers": len(names),
            "rank": RANK,
            "compress_seconds": seconds["compress"],
            "svd_loop_seconds": seconds["svd_loop"],
            "ratio": seconds["compress"] / seconds["svd_loop"],
            "ratio_goal": 0.25,
            "largest_excess_error": max(excess),
            "largest_excess_error_goal": 0.001,
        },
        options.out,
    )


if __name__ == "__main__":
    main()

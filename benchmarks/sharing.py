"""Measure what sharing a first factor buys: accuracy and latency at equal bytes, without and with ``share``.

- all-MiniLM-L6-v2 at ``keep=0.3``: mean cosine to the dense embeddings of the STS Benchmark's sentences
  (dev), calibrated on 2,000 of its training sentences, and the latency of 8 × 128 and 1 × 128 tokens.
- With ``--smollm2``, SmolLM2-135M at ``keep=0.8``: perplexity of 24 windows of WikiText-2 that calibration
  (96 windows) has not seen.

Models without a shared factor stand beside ``share="inputs"`` and ``share="layers"``. The folder given with
``--data`` holds ``stsb-train.csv``, ``stsb-dev.csv`` and ``wikitext2-valid.txt``.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from common import finish, interleaved_medians, parser, smollm2
from torch import nn
from transformers import AutoModel, AutoTokenizer

import lowrank
from lowrank.calibration.data import windows
from lowrank.calibration.text_files import read_pairs, read_text
from lowrank.demo import minilm_folder
from lowrank.reports.evaluation import embed, perplexity

SHARES = (None, "inputs", "layers")


def compressed(
    dense: nn.Module, stats: lowrank.Stats, share: str | None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a compressed copy, and what its plan says."""
    start = time.perf_counter()
    plan = lowrank.plan(dense, stats=stats, share=share, **options)
    planned = time.perf_counter()
    small = lowrank.apply(copy.deepcopy(dense), plan, stats)
    return small, {
        "share": share,
        "keep": options["keep"],
        "kept_fraction": plan.kept_fraction,
        "layers_that_share": sum(len(layers) for layers in plan.shared.values()),
        "bases": len(plan.shared),
        "predicted_loss_increase": plan.loss_increase,
        "plan_seconds": planned - start,
        "apply_seconds": time.perf_counter() - planned,
    }


def minilm(data: Path, keep: float, repeats: int) -> list[dict[str, Any]]:
    """Compare embeddings and latencies of models of equal size."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).eval()
    train = list(dict.fromkeys(text for pair in read_pairs(data / "stsb-train.csv")[0] for text in pair))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:2000]
    stats = lowrank.calibrate(dense, [train[i] for i in order.tolist()], tokenizer)
    texts = list(dict.fromkeys(text for pair in read_pairs(data / "stsb-dev.csv")[0] for text in pair))
    expected = embed(dense, texts, tokenizer)
    models, rows = {}, []
    for share in SHARES:
        models[str(share)], row = compressed(dense, stats, share, keep=keep)
        row["cosine_to_dense"] = float(
            (embed(models[str(share)], texts, tokenizer) * expected).sum(-1).mean()
        )
        print(row, flush=True)
        rows.append(row)
    models["dense"] = dense
    rows.append({"share": "dense"})
    for batch in (8, 1):
        ids = torch.randint(30522, (batch, 128), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            tasks = {name: (lambda model=model, ids=ids: model(ids)) for name, model in models.items()}
            seconds = interleaved_medians(tasks, repeats if batch > 1 else 4 * repeats, warmup=3)
        for row in rows:
            row[f"ms_of_{batch}x128_tokens"] = 1e3 * seconds[str(row["share"])]
    return rows


def language_model(data: Path) -> list[dict[str, Any]]:
    """Compare perplexities of models of equal size."""
    dense, tokenizer = smollm2()
    ids = windows(read_text(data / "wikitext2-valid.txt"), tokenizer)
    held_out = ids[300:324].flatten()
    stats = lowrank.calibrate(dense, [{"input_ids": part} for part in ids[:96].split(2)])
    rows: list[dict[str, Any]] = [{"share": "dense", "perplexity": perplexity(dense, held_out)}]
    for share in (None, "layers"):
        small, row = compressed(dense, stats, share, keep=0.8, add_bias=True)
        row["perplexity"] = perplexity(small, held_out)
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--keep", type=float, default=0.3, help="for MiniLM")
    arguments.add_argument("--repeats", type=int, default=25, help="of each latency")
    arguments.add_argument("--smollm2", action="store_true", help="measure SmolLM2-135M too")
    options = arguments.parse_args()
    figures = {"minilm": minilm(options.data, options.keep, options.repeats)}
    if options.smollm2:
        figures["smollm2"] = language_model(options.data)
    finish("sharing", figures, options.out)


if __name__ == "__main__":
    main()

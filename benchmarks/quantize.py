"""Measure what integer weights cost and win: bytes, accuracy and latency, beside PyTorch's dynamic int8.

- ``minilm``: all-MiniLM-L6-v2 dense and compressed, as floating point, int8 and int4: bytes of the whole
  checkpoint, STS Benchmark (dev) and the cosine to the embeddings before coding.
- ``speed``: ``BertModel(BertConfig())``, batch 8 × 128 tokens: latency of the dense model, of
  ``torch.ao.quantization.quantize_dynamic`` of it, and of ``keep=0.5`` in float32 and int8.

The folder given with ``--data`` holds ``stsb-train.csv`` and ``stsb-dev.csv``.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import environment, interleaved_medians, parser
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import lowrank
from lowrank.demo import minilm_folder
from lowrank.evaluation import embed, spearman
from lowrank.textfiles import read_pairs

SMALLEST = {
    "keep 0.4, int8, tables int4": (0.4, "int8", 32),
    "keep 0.5, int4": (0.5, "int4", 32),
    "keep 0.25, int4, tables in groups of 128": (0.25, "int4", 128),
}
"""What is kept, how layers are coded, and the elements of a table's row that share a scale."""


def minilm(data: Path, minutes: float) -> list[dict[str, Any]]:
    """Compare checkpoints of one model by bytes and accuracy."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).eval()
    train = list(dict.fromkeys(text for pair in read_pairs(data / "stsb-train.csv")[0] for text in pair))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:2000]
    stats = lowrank.calibrate(dense, [train[i] for i in order.tolist()], tokenizer)
    pairs, scores = read_pairs(data / "stsb-dev.csv")
    texts = [text for pair in pairs for text in pair]

    def row(name: str, model: nn.Module, before: nn.Module | None = None) -> dict[str, Any]:
        found = embed(model, texts, tokenizer)
        cosines = (found[0::2] * found[1::2]).sum(-1)
        with tempfile.TemporaryDirectory() as scratch:
            saved = lowrank.save(model, Path(scratch) / "model")
            size = (saved / "model.safetensors").stat().st_size
        figures: dict[str, Any] = {"model": name, "bytes": size}
        figures["sts_spearman"] = 100 * spearman(cosines, torch.tensor(scores, dtype=torch.float64))
        if before is not None:
            figures["cosine_to_uncoded"] = float((found * embed(before, texts, tokenizer)).sum(-1).mean())
        print(figures, flush=True)
        return figures

    rows = [row("dense", dense)]
    half = lowrank.compress(copy.deepcopy(dense), keep=0.5, stats=stats, round_to=32)
    rows.append(row("keep 0.5", half))
    for name, base in (("dense", dense), ("keep 0.5", half)):
        for scheme in ("int8", "int4"):
            for known in (None, stats):
                coded = lowrank.quantize(copy.deepcopy(base), scheme, stats=known)
                rows.append(row(f"{name}, {scheme}{', calibrated' if known else ''}", coded, base))
    for name, (keep, scheme, group) in SMALLEST.items():
        small = lowrank.compress(copy.deepcopy(dense), keep=keep, stats=stats, round_to=32)
        if minutes:
            lowrank.recover(small, dense, train, tokenizer, minutes=minutes)
        lowrank.quantize(small, "int4", targets=["embeddings.*"], group_size=group)
        lowrank.quantize(small, "int4", targets=["pooler.*"])
        before = copy.deepcopy(small)
        lowrank.quantize(small, scheme, stats=stats)
        rows.append(row(f"{name}, {minutes} min of recover", small, before))
    return rows


def speed(repeats: int) -> dict[str, Any]:
    """Time the dense model, PyTorch's dynamic int8 of it, and the compressed one."""
    torch.manual_seed(0)
    dense = BertModel(BertConfig()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, torch.qint8)
    small = lowrank.compress(copy.deepcopy(dense), keep=0.5)
    models = {
        "dense": dense,
        "dense, torch dynamic int8": dynamic,
        "dense, int8": lowrank.quantize(copy.deepcopy(dense)),
        "keep 0.5": small,
        "keep 0.5, int8": lowrank.quantize(copy.deepcopy(small)),
    }
    ids = torch.randint(30522, (8, 128))
    with torch.no_grad():
        outputs = {name: model(ids).last_hidden_state for name, model in models.items()}
        tasks = {name: (lambda model=model: model(ids)) for name, model in models.items()}
        seconds = interleaved_medians(tasks, repeats, warmup=2)
    figures: dict[str, Any] = {
        name: {"ms": 1e3 * value, "speedup_over_dense": seconds["dense"] / value}
        for name, value in seconds.items()
    }
    figures["speedup_over_torch_dynamic"] = seconds["dense, torch dynamic int8"] / seconds["keep 0.5, int8"]
    pairs = {"keep 0.5, int8": "keep 0.5", "dense, int8": "dense", "dense, torch dynamic int8": "dense"}
    for name, before in pairs.items():
        found = torch.cosine_similarity(outputs[name], outputs[before], dim=-1).mean()
        figures[name]["cosine_to_uncoded"] = float(found)
    return figures


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--part", choices=("minilm", "speed"), required=True)
    arguments.add_argument("--minutes", type=float, default=0.0, help="of recovery; 0 for none")
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    if options.part == "minilm" and options.data is None:
        arguments.error("--part minilm needs --data")
    figures = minilm(options.data, options.minutes) if options.part == "minilm" else speed(options.repeats)
    print(json.dumps(figures, indent=2))
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[options.part] = {"environment": environment(), "figures": figures}
        options.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measure what integer weights cost and win: bytes, accuracy and latency, beside PyTorch's dynamic int8.

- ``minilm``: all-MiniLM-L6-v2 dense and compressed, as floating point, int8 and int4: bytes of the whole
  checkpoint, STS Benchmark (dev) and the cosine to the embeddings before quantizing.
- ``correction``: SmolLM2-135M, int4 and int4 with low-rank correction at the same bytes: perplexity on
windows
  300 to 323 of WikiText-2's validation text, which calibration has not seen.
- ``speed``: ``BertModel(BertConfig())``, batch 8 × 128 tokens: latency of the dense model, of
  ``torch.ao.quantization.quantize_dynamic`` of it, and of ``keep=0.5`` in float32 and int8; each eager
  and by ``torch.compile``.
- ``int4``: one layer at a time on a few tokens, on ``--device``: latency of floating point (float32, on CUDA
  bfloat16), of int4 by PyTorch's kernel and dequantized, and of int8.

The folder given with ``--data`` holds ``stsb-train.csv``, ``stsb-dev.csv`` and ``wikitext2-valid.txt``.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import environment, interleaved_medians, parser, smollm2
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import lowrank
from lowrank.calibration.data import windows
from lowrank.calibration.text_files import read_pairs, read_text
from lowrank.demo import minilm_folder
from lowrank.linalg import Scheme
from lowrank.nn import integer_matmul
from lowrank.reports.evaluation import embed, perplexity, spearman

SMALLEST = (11_400_000, 9_500_000, 7_900_000, 6_000_000)
"""Bytes of parameters and buffers within which the solver chooses how each layer is stored."""

SIZES = {
    "cpu": [(576, 576), (576, 1536), (1536, 384), (768, 3072), (3072, 768)],
    "cuda": [(768, 3072), (4096, 4096), (4096, 11008)],
}
"""Layers that the part ``int4`` times, as (in, out)."""


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
    for limit in SMALLEST:
        small = lowrank.compress(copy.deepcopy(dense), max_bytes=limit, quantize="auto", stats=stats)
        rows.append(row(f"auto within {limit / 1e6:g} MB", small, dense))
        if minutes:
            lowrank.recover(small, dense, train, tokenizer, minutes=minutes)
            rows.append(row(f"auto within {limit / 1e6:g} MB, {minutes:g} min of recover", small, dense))
    return rows


def correction(data: Path, count: int) -> list[dict[str, Any]]:
    """Compare int4 with and without low-rank correction at the same bytes; ``count`` windows to calibrate."""
    packed, tokenizer = smollm2()
    dense = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
    dense.load_state_dict(packed.state_dict())
    dense.eval()
    del packed
    ids = windows(read_text(data / "wikitext2-valid.txt"), tokenizer)
    stats = lowrank.calibrate(dense, [{"input_ids": pair} for pair in ids[:count].split(2)])
    base = perplexity(dense, ids[300:324].flatten())

    def row(name: str, model: nn.Module) -> dict[str, Any]:
        figures: dict[str, Any] = {"model": name, "bytes": _bytes(model)}
        figures["perplexity"] = perplexity(model, ids[300:324].flatten())
        figures["increase"] = figures["perplexity"] - base
        print(figures, flush=True)
        return figures

    nearest = copy.deepcopy(dense)
    for layer in lowrank.plan(dense, rank=8).targeted:
        _round_to_nearest(nearest.get_submodule(layer.name).weight)
    rows = [row("dense", dense), row("int4, groups of 32, round to nearest", nearest)]
    layers: dict[str, Any] = {"ignore": ["*embed_tokens"]}  # which is the head, too, and stays as it is
    plain = lowrank.quantize(copy.deepcopy(dense), "int4", **layers)
    limit = _bytes(plain)
    rows[1]["bytes"] = limit  # it would be stored like the next one
    rows.append(row("int4, groups of 32, searched scales", plain))
    del plain, nearest
    small = lowrank.quantize(copy.deepcopy(dense), "int4", stats=stats, **layers)
    rows.append(row("int4, groups of 32, calibrated", small))
    how: dict[str, Any] = {"stats": stats, "max_bytes": limit, **layers}
    small = lowrank.compress(copy.deepcopy(dense), quantize="int4", group_size=96, correction=True, **how)
    rows.append(row("int4, groups of 96, with low-rank correction, at the same bytes", small))
    small = lowrank.compress(copy.deepcopy(dense), quantize="auto", group_size=96, **how)
    rows.append(row("chosen by layer, at the same bytes", small))
    for name in rows[2:]:
        name["increase_over_round_to_nearest"] = name["increase"] / rows[1]["increase"]
    return rows


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def _round_to_nearest(weight: torch.Tensor, group: int = 32) -> None:
    """Round each group of a row to 4 bits, with the scale that just holds its largest element."""
    groups = weight.view(len(weight), -1, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    scale = torch.where(scale > 0, scale, 1.0)
    weight.copy_(((groups / scale).round().clamp(-8, 7) * scale).view_as(weight))


def speed(repeats: int) -> dict[str, Any]:
    """Time the dense model, PyTorch's dynamic int8 of it, and the compressed one; eager and compiled."""
    torch.manual_seed(0)
    dense = BertModel(BertConfig()).eval()
    small = lowrank.compress(copy.deepcopy(dense), keep=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic, of_factors = (
            torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
            for model in (dense, small)
        )
    models: dict[str, Any] = {
        "dense": dense,
        "dense, torch dynamic int8": dynamic,
        "dense, int8": lowrank.quantize(copy.deepcopy(dense)),
        "keep 0.5": small,
        "keep 0.5, torch dynamic int8": of_factors,
        "keep 0.5, int8": lowrank.quantize(copy.deepcopy(small)),
    }
    models |= {f"{name}, compiled": torch.compile(copy.deepcopy(model)) for name, model in models.items()}
    ids = torch.randint(30522, (8, 128))
    with torch.no_grad():
        outputs = {name: model(ids).last_hidden_state for name, model in models.items()}
        tasks = {name: (lambda model=model: model(ids)) for name, model in models.items()}
        seconds = interleaved_medians(tasks, repeats, warmup=2)
    figures: dict[str, Any] = {
        name: {"ms": 1e3 * value, "speedup_over_dense": seconds["dense"] / value}
        for name, value in seconds.items()
    }
    fastest = min(seconds["dense, torch dynamic int8"], seconds["dense, torch dynamic int8, compiled"])
    for name in ("keep 0.5, int8", "keep 0.5, int8, compiled"):
        figures[name]["speedup_over_the_faster_torch_dynamic"] = fastest / seconds[name]
    for name in models:
        if "int8" in name:
            before = outputs[name.split(",")[0]]
            found = torch.cosine_similarity(outputs[name], before, dim=-1).mean()
            figures[name]["cosine_to_uncoded"] = float(found)
    return figures


def int4(device: str, repeats: int) -> list[dict[str, Any]]:
    """Time layers by the number of tokens, which decides what multiplies."""
    rows = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    most = integer_matmul.MOST_ROWS[device]
    for size in SIZES[device]:
        dense = nn.Linear(*size).eval()
        layers = [
            lowrank.QuantizedLinear.from_weight(dense.weight, dense.bias, Scheme("int4")) for _ in range(2)
        ]
        integers = lowrank.QuantizedLinear.from_weight(dense.weight, dense.bias, Scheme("int8"))
        dense, kernel, decoded, integers = (layer.to(device, dtype) for layer in (dense, *layers, integers))
        for tokens in (1, 8, 32, 64, 128, 256, 1024):
            inputs = torch.randn(tokens, size[0], device=device, dtype=dtype)

            def run(layer: nn.Module, limit: int, inputs: torch.Tensor = inputs) -> None:
                integer_matmul.MOST_ROWS[device] = limit
                for _ in range(10):
                    layer(inputs)
                if device == "cuda":
                    torch.cuda.synchronize()

            tasks = {
                "float": lambda dense=dense: run(dense, most),
                "int4 by the kernel": lambda kernel=kernel: run(kernel, 2**20),
                "int4 dequantized": lambda decoded=decoded: run(decoded, 0),
                "int8": lambda integers=integers: run(integers, most),
            }
            with torch.no_grad():
                seconds = interleaved_medians(tasks, repeats, warmup=2)
            figures = {name: round(1e5 * value, 1) for name, value in seconds.items()}
            rows.append({"in, out": size, "tokens": tokens, "microseconds": figures})
            print(rows[-1], flush=True)
    integer_matmul.MOST_ROWS[device] = most
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--part", choices=("minilm", "correction", "speed", "int4"), required=True)
    arguments.add_argument("--minutes", type=float, default=0.0, help="of recovery; 0 for none")
    arguments.add_argument("--windows", type=int, default=96, help="of 512 tokens to calibrate residual on")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the part int4")
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    if options.part in ("minilm", "correction") and options.data is None:
        arguments.error(f"--part {options.part} needs --data")
    figures: Any
    if options.part == "minilm":
        figures = minilm(options.data, options.minutes)
    elif options.part == "correction":
        figures = correction(options.data, options.windows)
    elif options.part == "int4":
        figures = int4(options.device, options.repeats)
    else:
        figures = speed(options.repeats)
    print(json.dumps(figures, indent=2))
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        part = options.part if options.device == "cpu" else f"{options.part}, {options.device}"
        known[part] = {"environment": environment(), "figures": figures}
        options.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measure what calibration and recovery buy on real models, beside the published methods, at equal size.

Every method is a metric and an allocation of this library: truncated SVD (``weight``, uniform ranks),
ASVD-like scaling (``diagonal``, uniform), FWSVD (the Fisher information of each input row, uniform),
DRONE and SVD-LLM's optimum (``inputs``, uniform; centred and with a bias where the layer has one), the
same with global allocation, and ``loss``, the default. The parts:

- ``prediction``: all-MiniLM-L6-v2, the loss that plans from 3 to 512 sentences predict, beside the true one.
- ``minilm``: all-MiniLM-L6-v2, cosine to the dense embeddings and STS Benchmark (dev), and SICK.
- ``smollm2``: SmolLM2-135M, perplexity of WikiText-2 text that calibration has not seen, and of text unlike
  it: captions and Penn Treebank.
- ``sequential``: SmolLM2 once more, block by block and with shared factors, then with all forms of layers,
  without any training.
- ``neurons``: MiniLM's feed-forward blocks alone, with factors, pivoted ones, or fewer neurons; nothing is
  trained.
- ``forms``, ``forms_smollm2``: all layers, with factors, pivoted ones, or fewer neurons chosen by one solver;
  the last also fitted block by block, and then trained.
- ``speedup``: MiniLM on 8 × 128 tokens, as fast as asked, by factors and by fewer neurons.
- ``sst2``: MiniLM with a classifier fine-tuned on SST-2, accuracy (dev).

Calibration text is of the STS Benchmark or WikiText-2, so figures on SICK and Penn Treebank tell what it is
worth on text unlike it.

The folder given with ``--data`` holds ``stsb-train.csv``, ``stsb-dev.csv``, ``sick-dev.txt``,
``wikitext2-valid.txt``, ``ptb-dev.txt``, ``sst2-train.tsv`` and ``sst2-dev.tsv``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment, interleaved_medians, parser, smollm2
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import lowrank
from lowrank.calibration.data import batches, windows
from lowrank.calibration.objectives import self_supervised
from lowrank.calibration.text_files import read_labelled, read_pairs, read_text
from lowrank.demo import minilm_folder
from lowrank.linalg import Diagonal, Metric, truncated_svd
from lowrank.reports.evaluation import accuracy, embed, embedding_cosine, perplexity, spearman

Figures = list[dict[str, Any]]

FORMS = (["factors"], ["factors", "pivoted"], ["factors", "neurons"], ["factors", "pivoted", "neurons"])

METHODS = {
    "svd": {"metric": "weight", "allocation": "uniform"},
    "asvd": {"metric": "diagonal", "allocation": "uniform"},
    "drone, svd-llm": {"metric": "inputs", "allocation": "uniform"},
    "inputs, global": {"metric": "inputs", "allocation": "global"},
    "loss, uniform": {"metric": "loss", "allocation": "uniform"},
    "loss, global": {"metric": "loss", "allocation": "global"},
}


def compressed(dense: nn.Module, keep: float, stats: lowrank.Stats, method: str, **options: Any) -> nn.Module:
    return lowrank.compress(copy.deepcopy(dense), keep=keep, stats=stats, **METHODS[method], **options)


def row_information(model: nn.Module, data: Any, tokenizer: Any, names: list[str]) -> dict[str, Tensor]:
    """Sum the squared gradients of each weight over its rows of inputs, as FWSVD weighs them.

    Source: Hsu et al. 2022 (arXiv:2207.00112).
    """
    found = {name: torch.zeros(model.get_submodule(name).in_features) for name in names}
    generator = torch.Generator().manual_seed(0)
    for batch in batches(data, tokenizer):
        model.zero_grad()
        self_supervised(batch.call(model), batch, generator).total.backward()
        for name in names:
            found[name] += model.get_submodule(name).weight.grad.square().sum(0)
    model.zero_grad()
    return found


def fwsvd(dense: nn.Module, keep: float, information: dict[str, Tensor]) -> nn.Module:
    """Return the dense form of the FWSVD-compressed model, with uniform ranks."""
    model = copy.deepcopy(dense)
    for layer in lowrank.plan(model, keep=keep, allocation="uniform").factorized:
        module = model.get_submodule(layer.name)
        metric = Metric(Diagonal(information[layer.name]))
        left, right, *_ = truncated_svd(module.weight, layer.rank, metric)
        module.weight.data = left @ right
    return model


def sick_pairs(file: Path) -> tuple[list[tuple[str, str]], list[float]]:
    """Read SICK: sentence pairs and their relatedness."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [(row[1], row[2]) for row in rows], [float(row[3]) for row in rows]


def stsb_sentences(data: Path) -> list[str]:
    """Return the sentences of the STS Benchmark's training part, each once, in a random order."""
    train = list(dict.fromkeys(text for pair in read_pairs(data / "stsb-train.csv")[0] for text in pair))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return [train[i] for i in order.tolist()]


def prediction(data: Path) -> Figures:
    """Compare the loss that a plan predicts, 1 − cosine to the dense embedding, with the true one."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).eval()
    train = stsb_sentences(data)
    unlike = list(dict.fromkeys(text for pair in sick_pairs(data / "sick-dev.txt")[0] for text in pair))

    def lost(small: nn.Module) -> dict[str, float]:
        return {
            "like": 1 - embedding_cosine(small, dense, train[-1000:], tokenizer),
            "unlike": 1 - embedding_cosine(small, dense, unlike[:1000], tokenizer),
        }

    figures: Figures = [{"sentences": 0, **lost(lowrank.compress(copy.deepcopy(dense), keep=0.5))}]
    for number in (3, 8, 32, 160, 512):
        start = time.perf_counter()
        stats = lowrank.calibrate(dense, train[:number], tokenizer)
        seconds = time.perf_counter() - start
        decided = lowrank.plan(dense, keep=0.5, stats=stats)
        predicted = sum(layer.loss_increase or 0.0 for layer in decided)
        small = lowrank.apply(copy.deepcopy(dense), decided, stats)
        figures.append(
            {
                "sentences": number,
                "tokens": stats.tokens,
                "calibrating_seconds": seconds,
                "predicted": predicted,
                **lost(small),
            }
        )
        print(figures[-1], flush=True)
    return figures


def sentence_model(data: Path) -> tuple[nn.Module, Any, list[str], Callable[[nn.Module], dict[str, float]]]:
    """Return MiniLM, its tokenizer, sentences to train on, and the figures on others, alike and unlike."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).eval()
    train = stsb_sentences(data)
    sets = {"sts": read_pairs(data / "stsb-dev.csv"), "sick": sick_pairs(data / "sick-dev.txt")}
    texts = {name: [text for pair in pairs for text in pair] for name, (pairs, _) in sets.items()}
    targets = {name: embed(dense, texts[name], tokenizer) for name in sets}

    def measure(model: nn.Module) -> dict[str, float]:
        figures = {}
        for name, (_, scores) in sets.items():
            found = embed(model, texts[name], tokenizer)
            cosines = (found[0::2] * found[1::2]).sum(-1)
            key = "cosine_to_dense" if name == "sts" else f"cosine_to_dense_{name}"
            figures[key] = float((found * targets[name]).sum(-1).mean())
            figures[f"{name}_spearman"] = 100 * spearman(cosines, torch.tensor(scores, dtype=torch.float64))
        return figures

    return dense, tokenizer, train, measure


def neurons(data: Path) -> Figures:
    """Compare factors with fewer neurons in feed-forward blocks, on sentence embeddings."""
    dense, tokenizer, train, measure = sentence_model(data)
    figures: Figures = [{"keep": 1.0, "method": "dense", **measure(dense)}]
    options = {"targets": ["*.intermediate.dense", "encoder.layer.?.output.dense"]}
    sample = train[:2000]
    stats = lowrank.calibrate(dense, sample, tokenizer, **options)
    inputs = dict(tokenizer(sample[:8], padding=True, return_tensors="pt"))
    methods: dict[str, dict[str, Any]] = {
        "factors, global": {},
        "pivoted, global": {"forms": ["factors", "pivoted"]},
        "neurons, uniform": {"forms": ["neurons"], "inputs": inputs, "allocation": "uniform"},
        "neurons, global": {"forms": ["neurons"], "inputs": inputs},
    }
    for keep in (0.7, 0.5):
        for method, more in methods.items():
            start = time.perf_counter()
            small = lowrank.compress(copy.deepcopy(dense), keep=keep, stats=stats, **options, **more)
            seconds = time.perf_counter() - start
            figures.append({"keep": keep, "method": method, "seconds": seconds, **measure(small)})
            print(figures[-1], flush=True)
    return figures


def forms(data: Path, minutes: float) -> Figures:
    """Let every layer of MiniLM become what loses least, of more and more forms."""
    dense, tokenizer, train, measure = sentence_model(data)
    figures: Figures = [{"keep": 1.0, "forms": [], **measure(dense)}]
    stats = lowrank.calibrate(dense, train[:2000], tokenizer)
    inputs = dict(tokenizer(train[:8], padding=True, return_tensors="pt"))
    for keep in (0.8, 0.5, 0.3):
        figures += compare_forms(dense, stats, inputs, keep, measure)
        decided = lowrank.plan(dense, keep=keep, stats=stats, forms=FORMS[-1], inputs=inputs)
        small = lowrank.apply(
            copy.deepcopy(dense), decided, stats, sequential=True, data=train[:2000], tokenizer=tokenizer
        )
        row = {"keep": keep, "forms": FORMS[-1], "sequential": True}
        figures.append({**row, **measure(small)})
        print(figures[-1], flush=True)
        if minutes:
            lowrank.recover(small, dense, train, tokenizer, minutes=minutes)
            figures.append({**row, "minutes": minutes, **measure(small)})
            print(figures[-1], flush=True)
    for scheme in ("int8", "int4"):
        for chosen in (FORMS[0], FORMS[2]):
            options = {"forms": chosen, "inputs": inputs, "quantize": scheme, "on_missing_kernel": "allow"}
            small = lowrank.compress(copy.deepcopy(dense), keep=0.5, stats=stats, **options)
            megabytes = lowrank.report(small).checkpoint_bytes / 1e6
            row = {"keep": 0.5, "forms": chosen, "quantize": scheme, "megabytes": megabytes}
            figures.append({**row, **measure(small)})
            print(figures[-1], flush=True)
    return figures


def speedup(data: Path) -> Figures:
    """Make MiniLM as fast as is asked on 8 texts of 128 tokens; measure both models in turn afterwards."""
    dense, tokenizer, train, measure = sentence_model(data)
    figures: Figures = [{"speedup": 1.0, "forms": [], **measure(dense)}]
    stats = lowrank.calibrate(dense, train[:2000], tokenizer)
    ids = torch.randint(1000, 30000, (8, 128), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for asked in (1.5, 2.0, 3.0):
        for chosen in (FORMS[0], FORMS[2]):
            small = lowrank.compress(
                copy.deepcopy(dense), speedup=asked, stats=stats, inputs=inputs, forms=chosen
            )
            with torch.no_grad():
                seconds = interleaved_medians(
                    {"dense": lambda: dense(**inputs), "small": lambda small=small: small(**inputs)}, 25
                )
            row = {"speedup": asked, "forms": chosen, "reached": seconds["dense"] / seconds["small"]}
            figures.append({**row, **measure(small)})
            print(figures[-1], flush=True)
    return figures


def forms_smollm2(data: Path) -> Figures:
    """Do as `forms` with SmolLM2, calibrated on 16 windows, measured on 12 others and 12 of unlike text."""
    dense, tokenizer = smollm2()
    ids = windows(read_text(data / "wikitext2-valid.txt"), tokenizer)
    treebank = windows(read_text(data / "ptb-dev.txt"), tokenizer)[:12].flatten()

    def measure(model: nn.Module) -> dict[str, float]:
        return {
            "perplexity": perplexity(model, ids[300:312].flatten()),
            "perplexity_penn_treebank": perplexity(model, treebank),
        }

    figures: Figures = [{"keep": 1.0, "forms": [], **measure(dense)}]
    stats = lowrank.calibrate(dense, [{"input_ids": pair} for pair in ids[:16].split(2)])
    few = [FORMS[0], FORMS[1], FORMS[-1]]
    inputs = {"input_ids": ids[:1]}
    for keep in (0.8, 0.6):
        figures += compare_forms(dense, stats, inputs, keep, measure, few, add_bias=True)
    return figures


def compare_forms(
    dense: nn.Module,
    stats: lowrank.Stats,
    inputs: dict[str, Tensor],
    keep: float,
    measure: Callable[[nn.Module], dict[str, float]],
    choices: Sequence[list[str]] = FORMS,
    **options: Any,
) -> Figures:
    """Return the predicted loss and the figures of each choice of forms at one size."""
    figures: Figures = []
    for chosen in choices:
        decided = lowrank.plan(dense, keep=keep, stats=stats, forms=chosen, inputs=inputs, **options)
        small = lowrank.apply(copy.deepcopy(dense), decided, stats)
        row = {
            "keep": keep,
            "forms": chosen,
            "pivoted": sum(layer.pivoted for layer in decided),
            "narrower": sum(layer.is_narrower for layer in decided),
            "factorized": sum(layer.rank is not None for layer in decided),
            "predicted": decided.loss_increase,
        }
        figures.append({**row, **measure(small)})
        print(figures[-1], flush=True)
    return figures


def minilm(data: Path, minutes: float) -> Figures:
    """Compare methods on sentence embeddings."""
    dense, tokenizer, train, measure = sentence_model(data)
    sample = train[:2000]
    figures: Figures = [{"keep": 1.0, "method": "dense", **measure(dense)}]
    start = time.perf_counter()
    stats = lowrank.calibrate(dense, sample, tokenizer)
    figures.append({"calibrating_seconds": time.perf_counter() - start, "sentences": len(sample)})
    information = row_information(dense, sample, tokenizer, list(stats.sources))
    for keep in (0.5, 0.3):
        figures.append({"keep": keep, "method": "fwsvd", **measure(fwsvd(dense, keep, information))})
        for method in METHODS:
            figures.append(
                {"keep": keep, "method": method, **measure(compressed(dense, keep, stats, method))}
            )
            print(figures[-1], flush=True)
        small = compressed(
            dense, keep, stats, "loss, global", sequential=True, data=sample, tokenizer=tokenizer
        )
        figures.append({"keep": keep, "method": "sequential", **measure(small)})
        print(figures[-1], flush=True)
        small = compressed(dense, keep, stats, "loss, global")
        lowrank.recover(small, dense, train, tokenizer, minutes=minutes)
        figures.append({"keep": keep, "method": "recovered", "minutes": minutes, **measure(small)})
        print(figures[-1], flush=True)
    return figures


def language_model(data: Path) -> tuple[nn.Module, Tensor, Callable[[nn.Module], dict[str, float]]]:
    """Return SmolLM2, windows of WikiText-2, and perplexities on windows 300 to 323 and unlike text."""
    dense, tokenizer = smollm2()
    ids = windows(read_text(data / "wikitext2-valid.txt"), tokenizer)
    sentences = [text for pair in read_pairs(data / "stsb-dev.csv")[0] for text in pair]
    unlike = windows(" ".join(sentences), tokenizer)[:24].flatten()
    treebank = windows(read_text(data / "ptb-dev.txt"), tokenizer)[:24].flatten()

    def measure(model: nn.Module) -> dict[str, float]:
        return {
            "perplexity": perplexity(model, ids[300:324].flatten()),
            "perplexity_other_text": perplexity(model, unlike),
            "perplexity_penn_treebank": perplexity(model, treebank),
        }

    return dense, ids, measure


def language_stats(dense: nn.Module, ids: Tensor, cache: Path | None, figures: Figures) -> lowrank.Stats:
    """Calibrate on 96 windows, or take the statistics that an earlier run has kept."""
    if cache is not None and cache.is_dir():
        return lowrank.Stats.load(cache)
    start = time.perf_counter()
    stats = lowrank.calibrate(dense, [{"input_ids": pair} for pair in ids[:96].split(2)])
    figures.append({"calibrating_seconds": time.perf_counter() - start, "windows": 96})
    if cache is not None:
        stats.save(cache)
    return stats


def sequential(data: Path, cache: Path | None) -> Figures:
    """Compare factors chosen layer by layer with factors fitted block by block; nothing is trained."""
    dense, ids, measure = language_model(data)
    figures: Figures = [{"keep": 1.0, "method": "dense", **measure(dense)}]
    stats = language_stats(dense, ids, cache, figures)
    for keep in (0.8, 0.6):
        for share in (None, "inputs"):
            decided = lowrank.plan(dense, keep=keep, stats=stats, add_bias=True, share=share)
            small = lowrank.apply(copy.deepcopy(dense), decided, stats)
            method = "loss, global" if share is None else "loss, global, shared"
            figures.append({"keep": keep, "method": method, **measure(small)})
            print(figures[-1], flush=True)
        decided = lowrank.plan(dense, keep=keep, stats=stats, add_bias=True)
        start = time.perf_counter()
        batches = [{"input_ids": pair} for pair in ids[:96].split(4)]
        small = lowrank.apply(copy.deepcopy(dense), decided, stats, sequential=True, data=batches)
        seconds = time.perf_counter() - start
        figures.append({"keep": keep, "method": "sequential", "seconds": seconds, **measure(small)})
        print(figures[-1], flush=True)
        decided = lowrank.plan(
            dense, keep=keep, stats=stats, add_bias=True, forms=FORMS[-1], inputs={"input_ids": ids[:1]}
        )
        for options in ({}, {"sequential": True, "data": batches}):
            small = lowrank.apply(copy.deepcopy(dense), decided, stats, **options)
            method = ", ".join([*FORMS[-1], *list(options)[:1]])
            figures.append({"keep": keep, "method": method, **measure(small)})
            print(figures[-1], flush=True)
    return figures


def smollm(data: Path, minutes: float, cache: Path | None) -> Figures:
    """Compare methods on a language model; calibrated on 96 windows, measured on 24 others."""
    dense, ids, measure = language_model(data)
    others = torch.cat([ids[:300], ids[324:]])
    figures: Figures = [{"keep": 1.0, "method": "dense", **measure(dense)}]
    stats = language_stats(dense, ids, cache, figures)
    for keep in (0.8, 0.6):
        for method in ("drone, svd-llm", "inputs, global", "loss, global"):
            small = compressed(dense, keep, stats, method, add_bias=method == "loss, global")
            figures.append({"keep": keep, "method": method, **measure(small)})
            print(figures[-1], flush=True)
        decided = lowrank.plan(dense, keep=keep, stats=stats, add_bias=True)
        sample = [{"input_ids": pair} for pair in ids[:96].split(4)]
        small = lowrank.apply(copy.deepcopy(dense), decided, stats, sequential=True, data=sample)
        figures.append({"keep": keep, "method": "sequential", **measure(small)})
        print(figures[-1], flush=True)
        if minutes:
            start = time.perf_counter()
            lowrank.recover(
                small, dense, [{"input_ids": pair} for pair in others.split(2)], minutes=minutes, held_out=4
            )
            seconds = time.perf_counter() - start
            figures.append({"keep": keep, "method": "recovered", "seconds": seconds, **measure(small)})
            print(figures[-1], flush=True)
    return figures


def sst2(data: Path, minutes: float) -> Figures:
    """Fine-tune a classifier, compress it to half, recover it."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    dense = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    texts, labels = read_labelled(data / "sst2-train.tsv")
    optimizer = torch.optim.AdamW(dense.parameters(), lr=5e-5)
    dense.train()
    for _ in range(2):
        for chosen in torch.randperm(len(texts)).split(32):
            batch = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
            wanted = torch.tensor([labels[i] for i in chosen])
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(dense(**batch).logits.float(), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    dense.eval()
    test = read_labelled(data / "sst2-dev.tsv")
    figures: Figures = [{"keep": 1.0, "method": "dense", "accuracy": accuracy(dense, *test, tokenizer)}]
    stats = lowrank.calibrate(dense, texts[:2000], tokenizer)
    for method in ("drone, svd-llm", "loss, global"):
        small = compressed(dense, 0.5, stats, method)
        figures.append({"keep": 0.5, "method": method, "accuracy": accuracy(small, *test, tokenizer)})
    lowrank.recover(small, dense, texts, tokenizer, minutes=minutes)
    score = accuracy(small, *test, tokenizer)
    figures.append({"keep": 0.5, "method": "recovered", "minutes": minutes, "accuracy": score})
    return figures


def parts(options: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    """Return what there is to measure, by name."""
    data, minutes, cache = options.data, options.minutes, options.stats
    return {
        "prediction": lambda: prediction(data),
        "minilm": lambda: minilm(data, minutes),
        "smollm2": lambda: smollm(data, minutes, cache),
        "sequential": lambda: sequential(data, cache),
        "neurons": lambda: neurons(data),
        "forms": lambda: forms(data, minutes),
        "speedup": lambda: speedup(data),
        "forms_smollm2": lambda: forms_smollm2(data),
        "sst2": lambda: sst2(data, minutes),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    names = parts(argparse.Namespace(data=None, minutes=0.0, stats=None))
    arguments.add_argument("--part", choices=names, required=True)
    arguments.add_argument("--minutes", type=float, default=9.5, help="of recovery; 0 for none")
    arguments.add_argument("--stats", type=Path, help="keep SmolLM2's statistics in this folder")
    options = arguments.parse_args()
    figures = parts(options)[options.part]()
    print(json.dumps(figures, indent=2))
    if options.out is not None:  # one file for the parts, which take long and are run one by one
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[options.part] = {"environment": environment(), "figures": figures}
        options.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Place this library's checkpoints beside other tools': bytes on disk, accuracy and latency, in one run.

Two models: all-MiniLM-L6-v2 (``minilm``) and SmolLM2-135M (``smollm2``). Beside each dense model stand

- ``lowrank``: int8, int4, int4 with a low-rank residual, low rank, and low rank with int8, all calibrated;
- PyTorch: ``torch.ao.quantization.quantize_dynamic``;
- torchao: int8 weights, and int8 weights with dynamic int8 activations; int4 where it runs;
- ONNX Runtime: float32, and dynamic int8 of the dense model and of this library's factors.

Every tool is used as it comes, on what it takes by default: PyTorch and torchao leave embeddings alone, so
that SmolLM2's head, quantized, is no longer tied to its table. Bytes are those of the file with the weights:
``model.safetensors``, ``torch.save`` of the state dict where a model has no other file, ``model.onnx`` with
its data. Accuracy is on text that calibration has not seen:

- ``minilm``: STS Benchmark (dev), and the mean cosine to the dense embeddings.
- ``smollm2``: perplexity of windows 300 to 323 of WikiText-2, and the mean KL divergence to the dense model.

All models are in memory while they are timed, in turn. ONNX Runtime gets PyTorch's number of threads, and
does not spin while others have their turn. With ``--compile`` those in `COMPILED` are also timed under
``torch.compile``, which torchao is made for.

The folder given with ``--data`` holds ``stsb-train.csv`` and ``stsb-dev.csv``, or ``wikitext2-valid.txt``.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import environment, interleaved_medians, parser, smollm2
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.exporters import (
    ExportedModel,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)

import lowrank
from lowrank.calibration.data import windows
from lowrank.calibration.text_files import read_pairs, read_text
from lowrank.demo import minilm_folder
from lowrank.reports.evaluation import embed, loss_increase, perplexity, spearman

COMPILED = (
    "dense",
    "int8",
    "low rank",
    "low rank, int8",
    "torch dynamic int8",
    "torchao int8 weights",
    "torchao int8 dynamic",
)
"""Rows that are also timed under ``torch.compile``; accuracy and bytes are the same."""

CALIBRATION_WINDOWS = 32
"""Windows of 512 tokens that SmolLM2 is calibrated on."""


@dataclass(frozen=True)
class Task:
    """A dense model, and what is asked of its compressed forms.

    Args:
        dense: The model; never changed.
        stats: What calibration learned of it.
        keep: The fraction of parameters that low rank keeps.
        inputs: What latency is measured with, by name.
        sample: What an export is traced with: two rows, since an axis of one is taken for fixed.
        measure: A model's accuracy, by name.
        options: Further arguments of `lowrank.compress`.
    """

    dense: nn.Module
    stats: lowrank.Stats
    keep: float
    inputs: dict[str, dict[str, Tensor]]
    sample: dict[str, Tensor]
    measure: Callable[[nn.Module], dict[str, float]]
    options: dict[str, Any] = field(default_factory=dict)


Made = tuple[nn.Module, int]
"""A model that runs, and the bytes of its file."""


def minilm(data: Path, limit: int | None, cache: Path | None) -> Task:
    """Return the sentence encoder, measured on pairs of sentences."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).eval()
    train = list(dict.fromkeys(text for pair in read_pairs(data / "stsb-train.csv")[0] for text in pair))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:2000]
    pairs, scores = read_pairs(data / "stsb-dev.csv")
    texts = [text for pair in pairs[:limit] for text in pair]
    wanted = torch.tensor(scores[:limit], dtype=torch.float64)
    target = embed(dense, texts, tokenizer)

    def measure(model: nn.Module) -> dict[str, float]:
        found = embed(model, texts, tokenizer)
        return {
            "sts_spearman": 100 * spearman((found[0::2] * found[1::2]).sum(-1), wanted),
            "cosine_to_dense": float((found * target).sum(-1).mean()),
        }

    def inputs(rows: int, tokens: int) -> dict[str, Tensor]:
        ids = random_ids(tokenizer.vocab_size, rows, tokens)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }

    stats = statistics(cache, lambda: lowrank.calibrate(dense, [train[i] for i in order.tolist()], tokenizer))
    timed = {"8 × 128 tokens": inputs(8, 128), "1 × 16 tokens": inputs(1, 16)}
    return Task(dense, stats, 0.5, timed, inputs(2, 16), measure)


def smollm(data: Path, limit: int | None, cache: Path | None) -> Task:
    """Return the language model, measured on windows of text."""
    read, tokenizer = smollm2()
    dense = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32).eval()
    dense.load_state_dict(read.state_dict())  # one read from GGUF refuses to be saved
    dense.config.use_cache = False
    ids = windows(read_text(data / "wikitext2-valid.txt"), tokenizer)
    unseen = ids[300:324][:limit]

    def measure(model: nn.Module) -> dict[str, float]:
        batches = [{"input_ids": pair} for pair in unseen.split(2)]
        return {
            "perplexity": perplexity(model, unseen.flatten()),
            "kl_to_dense_per_token": loss_increase(model, dense, batches),
        }

    seen = [{"input_ids": pair} for pair in ids[:CALIBRATION_WINDOWS].split(2)]
    stats = statistics(cache, lambda: lowrank.calibrate(dense, seen))
    sizes = ((1, 512), (1, 16))
    timed = {f"{b} × {t} tokens": {"input_ids": random_ids(len(tokenizer), b, t)} for b, t in sizes}
    sample = {"input_ids": random_ids(len(tokenizer), 2, 16)}
    return Task(dense, stats, 0.8, timed, sample, measure, {"add_bias": True})


def random_ids(vocabulary: int, rows: int, tokens: int) -> Tensor:
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


def statistics(cache: Path | None, calibrate: Callable[[], lowrank.Stats]) -> lowrank.Stats:
    """Calibrate, or take the statistics that an earlier run has kept."""
    if cache is not None and cache.is_dir():
        return lowrank.Stats.load(cache)
    stats = calibrate()
    if cache is not None:
        stats.save(cache)
    return stats


def makers(task: Task) -> dict[str, Callable[[], Made]]:
    """Return the rows, by name, and what makes each one's model."""
    import torchao.quantization as ao  # writes to stderr when imported

    def low_rank(**options: Any) -> nn.Module:
        given = {"keep": task.keep, **task.options, **options}
        return lowrank.compress(copy.deepcopy(task.dense), stats=task.stats, **given)

    def corrected() -> nn.Module:
        options = {"rank": 16, "correction": True, "quantize": "int4"}
        return lowrank.compress(copy.deepcopy(task.dense), stats=task.stats, **options)

    def coded(scheme: str) -> nn.Module:
        return lowrank.quantize(copy.deepcopy(task.dense), scheme, stats=task.stats)

    def onnx(model: nn.Module, **options: Any) -> Made:
        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(**options)) if options else None
        return on_onnx_runtime(model, task.sample, quantizer)

    return {
        "dense": lambda: saved(task.dense),
        "int8": lambda: saved(coded("int8")),
        "int4": lambda: saved(coded("int4")),
        "int4 with residual": lambda: saved(corrected()),
        "low rank": lambda: saved(low_rank()),
        "low rank, int8": lambda: saved(low_rank(quantize="int8")),
        "torch dynamic int8": lambda: torch_dynamic(task.dense),
        "torchao int8 weights": lambda: torchao(task.dense, ao.Int8WeightOnlyConfig()),
        "torchao int8 dynamic": lambda: torchao(task.dense, ao.Int8DynamicActivationInt8WeightConfig()),
        "torchao int4 weights": lambda: torchao(task.dense, ao.Int4WeightOnlyConfig(group_size=32)),
        "ONNX Runtime": lambda: onnx(task.dense),
        "ONNX Runtime int8": lambda: onnx(task.dense, per_channel=False),
        "ONNX Runtime int8 by channel": lambda: onnx(task.dense, per_channel=True),
        "low rank, ONNX Runtime int8 by channel": lambda: onnx(low_rank(), per_channel=True),
    }


def saved(model: nn.Module) -> Made:
    """Return the model and the bytes of its checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = lowrank.save(model, Path(scratch) / "model")
        return model, (folder / "model.safetensors").stat().st_size


def pickled(model: nn.Module) -> Made:
    """Return the model and the bytes that ``torch.save`` makes of its state dict."""
    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.state_dict(), file.name)
        return model, Path(file.name).stat().st_size


def torch_dynamic(dense: nn.Module) -> Made:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still the usual way
        return pickled(torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, torch.qint8))


def torchao(dense: nn.Module, config: Any) -> Made:
    from torchao.quantization import quantize_

    model = copy.deepcopy(dense)
    quantize_(model, config)
    return pickled(model)


class OnOnnxRuntime(nn.Module):
    """An exported model, to be called and measured as any other."""

    def __init__(self, exported: ExportedModel) -> None:
        super().__init__()
        self.exported = exported

    def forward(self, **inputs: Tensor) -> Any:
        """Return what the model that was exported returns."""
        return self.exported(**inputs)


def on_onnx_runtime(
    model: nn.Module, sample: dict[str, Tensor], quantizer: OnnxRuntimeQuantizer | None
) -> Made:
    """Export the model, and run it from its file as ONNX Runtime would elsewhere."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    exported = OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True, quantizer=quantizer))
    with tempfile.TemporaryDirectory() as scratch:
        exported.save_pretrained(scratch)
        size = sum(file.stat().st_size for file in Path(scratch).glob("model.onnx*"))
    return OnOnnxRuntime(exported.to(session_options=options)), size


def measured(task: Task) -> tuple[dict[str, dict[str, Any]], dict[str, nn.Module], dict[str, str]]:
    """Make the models one by one; return rows, models, and why a row is left out."""
    rows, models, left_out = {}, {}, {}
    for name, make in makers(task).items():
        try:
            model, size = make()
        except ImportError as error:  # of a kernel that this processor's builds do not have
            left_out[name] = str(error)
            continue
        rows[name] = {"bytes": size, **task.measure(model)}
        models[name] = model
        print(name, rows[name], flush=True)
    return rows, models, left_out


def time_them(
    rows: dict[str, dict[str, Any]], models: dict[str, nn.Module], task: Task, repeats: int, compiled: bool
) -> None:
    """Add to every row its median latencies, and how much faster than dense that is."""
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one class of model, many models and two shapes
        models = models | {f"{x}, compiled": torch.compile(models[x], dynamic=False) for x in COMPILED}
    for shape, inputs in task.inputs.items():
        tasks = {name: (lambda model=model, inputs=inputs: model(**inputs)) for name, model in models.items()}
        with torch.no_grad():
            seconds = interleaved_medians(tasks, repeats, warmup=2)
        for name, median in seconds.items():
            figures = {"ms": 1e3 * median, "speedup_over_dense": seconds["dense"] / median}
            rows[name.removesuffix(", compiled")].setdefault(
                "latency_compiled" if name.endswith(", compiled") else "latency", {}
            )[shape] = figures


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=("minilm", "smollm2"), required=True)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--compile", action="store_true", help="also time under torch.compile; slow")
    arguments.add_argument("--limit", type=int, help="measure on fewer pairs or windows, to try the script")
    arguments.add_argument("--stats", type=Path, help="keep the statistics in this folder")
    options = arguments.parse_args()
    load = minilm if options.model == "minilm" else smollm
    task = load(options.data, options.limit, options.stats)
    rows, models, left_out = measured(task)
    time_them(rows, models, task, options.repeats, options.compile)
    tools = {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "torchao")}
    found = {
        "environment": environment() | tools,
        "figures": {
            "keep": task.keep,
            "rows": [{"model": name, **row} for name, row in rows.items()],
            "left_out": left_out,
        },
    }
    print(json.dumps(found, indent=2))
    if options.out is not None:  # one file for both models, which take long and are run one by one
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[options.model] = found
        options.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()

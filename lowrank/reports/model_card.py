"""The model card of a compressed model: what was done to it, what that saved, and how to load it.

It is Markdown in Hugging Face's format, with a YAML header that the hub reads.
"""

from __future__ import annotations

import itertools
from collections import Counter

from torch import nn

from lowrank.plans.formatting import format_bytes
from lowrank.reports.report import Report, report

INSTALL = "pip install torch-lowrank"

HOW_TO_LOAD = f"import lowrank before from_pretrained: {INSTALL}"
"""A line for people who open ``config.json``."""

_TRANSFORMERS = """import lowrank  # teaches from_pretrained the format
from transformers import {name}

model = {name}.from_pretrained("path/to/this/folder")"""

_MODULE = """import lowrank

model = lowrank.load("path/to/this/folder", model={name}(...))  # the dense architecture, freshly built"""

_WITHOUT = """Without `import lowrank`, transformers advises to delete `quantization_config` from
`config.json`. Do not: the ranks of the layers stand there, and the weights fit no others. `lowrank setup`,
called once, lets all programs of a Python environment load such folders as they are."""


def module_card(model: nn.Module) -> str:
    """Return the card of any module in a folder of `lowrank.save`."""
    code = _MODULE.format(name=type(model).__name__)
    return _card(model, _header("lowrank", None), "", [_block("python", code)])


def transformers_card(model: nn.Module, budget: str, base_model: str | None) -> str:
    """Return the card of a transformers model.

    Args:
        model: The compressed model.
        budget: The request, such as ``"keep=0.5"``; may be empty.
        base_model: Name on the hub of what it was made from, if known.
    """
    code = _TRANSFORMERS.format(name=type(model).__name__)
    return _card(model, _header("transformers", base_model), budget, [_block("python", code), _WITHOUT])


def _header(library: str, base_model: str | None) -> str:
    base = [] if base_model is None else [f"base_model: {base_model}"]
    return "\n".join(["---", f"library_name: {library}", *base, "tags:", "- lowrank", "- compression", "---"])


def _card(model: nn.Module, header: str, budget: str, loading: list[str]) -> str:
    tensors = itertools.chain(model.parameters(), model.buffers())
    offloaded = any(tensor.is_meta for tensor in tensors)  # then nothing can be counted
    sections = [
        header,
        f"# {type(model).__name__}, compressed by lowrank",
        *([] if offloaded else _figures(report(model), budget)),
        "## Load it",
        _block("bash", INSTALL),
        *loading,
    ]
    return "\n\n".join(sections) + "\n"


def _figures(costs: Report, budget: str) -> list[str]:
    done = [f"{len(costs.factorized)} of {len(costs.layers)} layers factorized"]
    schemes = Counter(code.scheme for code in costs.quantized)
    done += [f"{count} weights quantized to {scheme}" for scheme, count in sorted(schemes.items())]
    asked = f" (`{budget}`)" if budget else ""
    dense, now = format_bytes(costs.checkpoint_bytes_before), format_bytes(costs.checkpoint_bytes)
    table = [
        "| | before | now |",
        "|---|---|---|",
        f"| parameters | {costs.parameters_before:,} | {costs.parameters:,} |",
        f"| weights on disk | {dense} | {now} |",
    ]
    return [f"{', '.join(done)}{asked}.", "\n".join(table)]


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"

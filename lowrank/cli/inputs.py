"""Read what the commands are given: checkpoints, texts, statistics, tokenizers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import typer
from torch import nn

from lowrank.calibration.statistics import Stats
from lowrank.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    LowRankError,
)
from lowrank.pipeline.calibrate import calibrate


def load_model(source: str, quiet: bool) -> nn.Module:
    """Return the checkpoint at ``source``; the error for what cannot be loaded names it."""
    calm_transformers(quiet)
    from lowrank import hf
    from lowrank.files.folders import settle

    folder = Path(source)
    settle(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise LowRankError(f"{source}: no config.json here, so not a transformers folder.")
    if not folder.exists() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise LowRankError(f"{source}: there is no such folder.")
    try:
        return hf.load(source)
    except OSError as error:
        raise LowRankError(f"{source}: cannot be loaded: {error}") from error


class Samples(NamedTuple):
    """What a file of text holds, as `lowrank.calibrate` takes it."""

    data: list[Any]
    tokenizer: Any


def read_samples(model: nn.Module, source: str, file: Path | None, windows: int | None) -> Samples | None:
    """Read a file: a sample per line, or windows of 512 tokens for a language model."""
    if file is None:
        return None
    from lowrank.adapter import adapter
    from lowrank.calibration import data
    from lowrank.calibration.text_files import read_lines, read_text
    from lowrank.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    adapter().check_tokenizer(model, tokenizer)
    if not type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        return Samples(read_lines(file), tokenizer)
    ids = data.windows(read_text(file), tokenizer)[:windows]
    return Samples([{"input_ids": pair} for pair in ids.split(2)], None)  # type: ignore[no-untyped-call]


def first_batch(samples: Samples | None) -> Any:
    """Return the first samples as a batch to time: eight texts, or two windows."""
    if samples is None or samples.tokenizer is None:
        return samples.data[0] if samples is not None else None
    return dict(samples.tokenizer(samples.data[:8], padding=True, truncation=True, return_tensors="pt"))


def statistics_of(
    model: nn.Module,
    samples: Samples | None,
    folder: Path | None,
    progress: bool,
    loss: str,
    both: bool = False,
    **options: Any,
) -> Stats | None:
    """Load the statistics, or calibrate; ``both`` if the samples have another use, too.

    ``options`` are those of `lowrank.calibrate`: which layers, and the seed.
    """
    if samples is not None and folder is not None and not both:
        raise BudgetError("Give either --data or --stats, not both.")
    if folder is not None:
        return Stats.load(folder)
    if samples is None:
        return None
    return calibrate(model, *samples, objective_of(loss), progress=progress, **options)


def objective_of(loss: str) -> str | None:
    """Return what `lowrank.calibrate` takes for the option ``--loss``.

    Raises:
        DataError: If it is neither ``auto`` nor ``none``.
    """
    if loss not in ("auto", "none"):
        raise DataError(f"--loss {loss}: choose auto or none.")
    return None if loss == "none" else loss


def calm_transformers(quiet: bool) -> None:
    """Silence the warnings of transformers, and its progress bars where nobody watches."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()


def copy_tokenizer(model: nn.Module, source: str, folder: Path, out: Path, quiet: bool) -> None:
    """Write the source's tokenizer into ``folder``, if it can be the model's, or say why not."""
    from lowrank.hf.tokenizer import check_tokenizer, load_tokenizer

    try:
        tokenizer = load_tokenizer(source)
        check_tokenizer(model, tokenizer)
    except (CheckpointError, DataError) as error:
        if not quiet:
            typer.echo(f"lowrank: no tokenizer is copied to {out}: {one_line(error)}", err=True)
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the package tokenizers has no class for what the file system refuses
        raise OSError(f"the tokenizer: {error}") from error


def one_line(error: Exception) -> str:
    """Return the message of ``error`` as one line, with its class unless the library raised it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, LowRankError) else f"{type(error).__name__}: {text}"

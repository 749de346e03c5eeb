"""A model's own tokenizer: for a folder that has none transformers makes one up, which knows no word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lowrank.errors import CheckpointError, DataError

LEAST_SHARE = 0.5
"""The least share of a model's vocabulary that its own tokenizer has. Models pad theirs by some percent;
made-up tokenizers have none of it, or some hundred special tokens."""

_WHOLE = re.compile(r"tokenizer(\.[0-9.]+)?\.json|tokenizer\.model.*|tekken\.json|tiktoken\.model")
"""Files that hold a vocabulary for any class of tokenizers."""


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, or of a name on the hub; code that comes with it does not run.

    Raises:
        CheckpointError: If there is none, or it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        folder = Path(cached_file(source, "config.json")).parent
    except Exception as error:  # damaged files raise errors of many kinds
        raise CheckpointError(
            f"{source}: no tokenizer can be loaded: {type(error).__name__}: {error}"
        ) from error
    names = type(tokenizer).vocab_files_names
    if names and not _has_vocabulary(folder, names):
        wanted = sorted({"tokenizer.json", *_parts(names)})
        raise CheckpointError(
            f"{source}: there are no tokenizer files ({type(tokenizer).__name__} reads {', '.join(wanted)}). "
            "Copy those of the model into the folder."
        )
    return tokenizer


def _has_vocabulary(folder: Path, names: Mapping[str, str]) -> bool:
    files = {file.name for file in folder.iterdir()}
    parts = _parts(names)
    return any(map(_WHOLE.fullmatch, files)) or (bool(parts) and parts <= files)


def _parts(names: Mapping[str, str]) -> set[str]:
    """Return the files that make a vocabulary together, as the tokenizer's class names them."""
    return {names[key] for key in ("vocab_file", "merges_file", "vocab") if key in names}


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many tokens a model of transformers tells apart; ``None`` if that is not known."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        config = model.config.get_text_config()
    except ValueError:  # a model with several texts, each with a vocabulary
        return None
    size = config.to_dict().get("vocab_size")
    return size if isinstance(size, int) else None


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer of transformers that knows far fewer tokens than the model.

    Raises:
        DataError: If it does.
    """
    size = vocabulary_of(model)
    if size is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if len(tokenizer) < LEAST_SHARE * size:
        raise DataError(
            f"tokenizer={type(tokenizer).__name__} has {len(tokenizer):,} tokens, and {type(model).__name__} "
            f"{size:,}. It is another model's, or transformers made it up for a folder without tokenizer "
            "files. Give the model's own."
        )

"""Turn what users have (sentences, tensors, dicts, a DataLoader) into batches that a model is called with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import DataError, LowRankError

LONGEST = 512
"""Tokens that a sentence is cut to, unless the tokenizer or the caller says less."""

PARTS = 4
"""Into how many parts batches are dealt in turn; what the others gave is tried on one of them."""

CHUNK = 16
"""Batches' worth of strings that are tokenized at once, and sorted by length."""


@dataclass(frozen=True)
class Batch:
    """One call of a model.

    Args:
        index: Number of the batch, from 0.
        given: What the data yielded, on the model's device; a loss function gets it whole.
        arguments, keywords: What the model is called with. Of a tuple that is its first element: the
            others, labels mostly, are for the loss.
        mask: ``(batch, tokens)``, true for real tokens; ``None`` if all are.
    """

    index: int
    given: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    mask: Tensor | None

    def call(self, model: nn.Module) -> Any:
        """Call the model; its own error gets the batch's index as a note.

        Raises:
            DataError: If the model refuses the batch.
        """
        try:
            return model(*self.arguments, **self.keywords)
        except LowRankError:
            raise  # from a hook of ours
        except Exception as error:
            raise DataError(
                f"Batch {self.index}: {type(model).__name__} refuses it: {type(error).__name__}: {error}"
            ) from error

    def on(self, device: torch.device | str | None) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return as_batch(moved(self.given, device), self.index)

    @property
    def part(self) -> int:
        """The part of the data that this batch belongs to, from 0."""
        return self.index % PARTS

    @property
    def held_out(self) -> bool:
        """Whether this batch is one of those that are kept back where one part is."""
        return self.part == PARTS - 1

    @property
    def tokens(self) -> int:
        """Real tokens in the batch; of inputs without tokens, samples."""
        if self.mask is not None:
            return int(self.mask.sum())
        first = _first_tensor((*self.arguments, *self.keywords.values()))
        if first is None:
            return 1  # of objects that only the model understands
        if not first.numel():
            return 0
        return len(first) if first.is_floating_point() else first.numel()

    @property
    def samples(self) -> int:
        """How many samples the batch has."""
        first = _first_tensor((*self.arguments, *self.keywords.values()))
        return 1 if first is None else len(first)

    def digest(self) -> int:
        """Return a number that tells batches apart; the sum over batches does not depend on their order."""
        state = hashlib.sha256()
        for value in (*self.arguments, *self.keywords.values()):
            if isinstance(value, Tensor):
                state.update(f"{value.dtype}{tuple(value.shape)}".encode())
                dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
                flat = dense.contiguous().reshape(-1).view(torch.uint8)
                state.update(flat.cpu().numpy().tobytes())
        return int.from_bytes(state.digest()[:8], "big")

    def real(self, values: Tensor) -> Tensor:
        """Return the rows ``(tokens, features)`` of ``values (…, features)`` that belong to real tokens."""
        rows = values.reshape(-1, values.shape[-1])
        if self.mask is not None and len(rows) == self.mask.numel():
            return rows[self.mask.reshape(-1)]
        return rows

    def per_sample(self, values: Tensor) -> Tensor:
        """Return the sums ``(samples, features)`` of ``values (samples, …, features)`` over real tokens.

        Where the layer's rows are not told apart by sample, each is taken for one.
        """
        if self.mask is not None and values.shape[:-1].numel() == self.mask.numel():
            values = values.reshape(*self.mask.shape, -1)
            values = torch.where(self.mask[..., None], values, 0.0)
        if values.ndim < 3:
            return values.reshape(-1, values.shape[-1])
        return values.flatten(1, -2).sum(1)


def batches(
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None = None,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    by_length: bool = False,
) -> Iterator[Batch]:
    """Yield batches from ``data``, one at a time.

    Args:
        data: Strings, with a ``tokenizer``; or any iterable of batches, each a dict of tensors, a
            tensor, or a tuple whose first element is the model's input.
        tokenizer: A tokenizer of transformers, for strings.
        device: Where tensors are moved to.
        batch_size: Strings per batch.
        max_length: Longest string in tokens; by default what the tokenizer allows, at most 512.
        by_length: Whether strings of like length may be put together, which spares padding. The order
            then changes within every sixteen batches. Fewer strings are dealt to the batches in turn, so that
            each has some of all lengths, and to at least `PARTS` of them.

    Strings without tokens are left out.

    Raises:
        DataError: If there are no data, strings come without a tokenizer, or a batch is none of these or has
            no token: it is empty, or padding only.
    """
    scalar = isinstance(data, Tensor) and not data.ndim
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable) or scalar:
        raise DataError(
            f"data is {type(data).__name__}: give a list of strings, or an iterable of batches such as a "
            "DataLoader. One batch alone goes into a list: [batch]."
        )
    items = iter(data)
    first = next(items, None)
    if first is None:
        raise DataError("data has no batch. An iterator can be used up: give a list or a DataLoader.")
    items = itertools.chain([first], items)
    if isinstance(first, str):
        if tokenizer is None:
            raise DataError("data has strings, so a tokenizer is needed: pass tokenizer=...")
        items = _tokenized(items, tokenizer, batch_size, max_length, by_length)
    index = -1
    for index, given in enumerate(items):
        yield _checked(given, index, device)
    if index < 0:
        raise DataError("None of the strings in data has a token: all of them are empty. Give others.")


def _checked(given: Any, index: int, device: torch.device | str | None) -> Batch:
    """Return what the data yielded as a batch on the device, with at least one token."""
    try:
        batch = as_batch(moved(given, device), index)
    except (RuntimeError, NotImplementedError) as error:  # without data, or nested beyond Python's limit
        raise DataError(f"Batch {index} cannot be used on {device}: {error}") from error
    ids = batch.keywords.get("input_ids")
    if batch.mask is not None and isinstance(ids, Tensor) and ids.shape != batch.mask.shape:
        shapes = f"{tuple(batch.mask.shape)} and input_ids {tuple(ids.shape)}"
        raise DataError(
            f"Batch {index}: attention_mask has the shape {shapes}. Give one value for each token."
        )
    if batch.tokens:
        return batch
    why = "is empty" if batch.mask is None or not batch.mask.numel() else "is padding only: its mask is all 0"
    raise DataError(f"Batch {batch.index} {why}. Leave it out of the data.")


def windows(text: str | Tensor, tokenizer: Callable[..., Any] | None = None, *, tokens: int = 512) -> Tensor:
    """Cut one text into windows without overlap, as language models are calibrated and measured on.

    Args:
        text: The text, or its token ids ``(n,)``.
        tokenizer: Needed for a text.
        tokens: Length of a window.

    Returns:
        Token ids, shape ``(windows, tokens)``; what is left at the end is dropped.

    Raises:
        DataError: If the text is shorter than one window, or comes without a tokenizer.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise DataError("A text needs a tokenizer: pass tokenizer=..., or token ids.")
        text = torch.tensor(_called(tokenizer, text)["input_ids"])
    if text.ndim != 1:
        raise DataError(f"text has shape {tuple(text.shape)}: give token ids of one text, (n,).")
    count = len(text) // tokens
    if count < 1:
        raise DataError(f"{len(text):,} tokens do not make a window of {tokens}.")
    return text[: count * tokens].view(count, tokens)


def _tokenized(
    texts: Iterator[Any],
    tokenizer: Callable[..., Any],
    batch_size: int,
    max_length: int | None,
    by_length: bool,
) -> Iterator[dict[str, Tensor]]:
    limit = max_length or min(LONGEST, getattr(tokenizer, "model_max_length", LONGEST))
    while chunk := list(itertools.islice(texts, CHUNK * batch_size)):
        strange = next((text for text in chunk if not isinstance(text, str)), None)
        if strange is not None:
            raise DataError(f"data mixes strings with {type(strange).__name__}. Give one kind only.")
        encoded = _called(tokenizer, chunk, truncation=True, max_length=limit, return_attention_mask=True)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = [i for i, length in enumerate(lengths) if length]
        if by_length:
            order.sort(key=lengths.__getitem__)
        few = max(-(-len(order) // batch_size), min(PARTS, len(order)))
        if by_length and few < CHUNK:
            dealt = [order[start::few] for start in range(few)]
        else:
            dealt = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for rows in dealt:  # padded here: not every tokenizer has a token for it
            yield {key: _padded([values[i] for i in rows]) for key, values in encoded.items()}


def _called(tokenizer: Callable[..., Any], texts: str | list[Any], **options: Any) -> Any:
    """Return what the tokenizer makes of texts, or say that it is none."""
    try:
        encoded = tokenizer(texts, **options)
        encoded["input_ids"]
    except Exception as error:
        raise DataError(
            f"tokenizer={type(tokenizer).__name__} cannot encode texts as those of transformers do: "
            f"{type(error).__name__}: {error}"
        ) from error
    return encoded


def _padded(rows: list[list[int]]) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def as_batch(given: Any, index: int = 0) -> Batch:
    """Wrap one batch; raises `DataError` if it is nothing that a model is called with."""
    if isinstance(given, Tensor) and given.ndim:
        return Batch(index, given, (given,), {}, None)
    if isinstance(given, Mapping):
        mask = given.get("attention_mask")
        usable = isinstance(mask, Tensor) and mask.ndim == 2
        return Batch(index, given, (), dict(given), mask.bool() if usable else None)  # type: ignore[union-attr]
    if isinstance(given, (tuple, list)) and given:
        inner = as_batch(given[0], index)
        return Batch(index, given, inner.arguments, inner.keywords, inner.mask)
    what = "a tensor without dimensions" if isinstance(given, Tensor) else type(given).__name__
    raise DataError(
        f"Batch {index} is {what}: a batch is a dict of tensors, a tensor, or a tuple whose "
        "first element is the model's input."
    )


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    """Return the first tensor with dimensions, also inside of dicts, tuples and lists."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return value
        inside = value.values() if isinstance(value, Mapping) else value
        found = _first_tensor(inside) if isinstance(inside, (tuple, list, ValuesView)) else None
        if found is not None:
            return found
    return None


def moved(value: Any, device: torch.device | str | None) -> Any:
    """Return ``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device) if device is not None else value
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([moved(item, device) for item in value]) if type(value) in (tuple, list) else value
    return value

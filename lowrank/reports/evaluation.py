"""How good a model is, in the four ways that tell compressed models apart.

`embedding_cosine` compares with the dense model itself and needs no labels; it shows differences
between methods long before a benchmark's score does. Every function leaves the model's mode and
random state alone, and follows its device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import adapter
from lowrank.arguments import MODEL_OF, accepts, every, function, instance, number, optional, text, whole
from lowrank.calibration.data import as_batch, batches, windows
from lowrank.calibration.objectives import increase, pooled
from lowrank.errors import DataError, LowRankError
from lowrank.inspection.contexts import evaluating
from lowrank.inspection.devices import device_of

_MODEL = instance(nn.Module, MODEL_OF)
_TEXTS = every(text(DataError), (list, tuple), "a list of strings", DataError)


@accepts(model=_MODEL, texts=_TEXTS, tokenizer=function, batch_size=whole(1))
def embed(
    model: nn.Module, texts: Sequence[str], tokenizer: Callable[..., Any], *, batch_size: int = 64
) -> Tensor:
    """Embed texts as sentence encoders do: the mean over real tokens, normalised.

    Args:
        model: An encoder that returns ``last_hidden_state (batch, tokens, features)``.
        texts: Any number of strings; each is cut to what the tokenizer allows, at most 512 tokens.
        tokenizer: The model's tokenizer.
        batch_size: Texts per forward pass.

    Returns:
        Shape ``(texts, features)``, rows of norm 1, on the model's device.

    Raises:
        DataError: If there are no texts, or the model refuses them.
    """
    adapter().check_tokenizer(model, tokenizer)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    ordered = [texts[i] for i in order]
    parts = []
    with evaluating(model):
        for batch in batches(ordered, tokenizer, device=device_of(model), batch_size=batch_size):
            outputs = batch.call(model)
            if not isinstance(outputs, Mapping) or "last_hidden_state" not in outputs:
                raise DataError(
                    f"{type(model).__name__} returns no last_hidden_state; embed needs an encoder."
                )
            part = pooled(outputs["last_hidden_state"].float(), batch.mask)
            _check_finite_outputs(model, part, batch.index)
            parts.append(part)
    embeddings = torch.cat(parts)
    if len(embeddings) != len(texts):
        raise DataError("Some texts have no tokens. Take the empty ones out.")
    return embeddings[torch.tensor(order, device=embeddings.device).argsort()]


@accepts(model=_MODEL, dense=_MODEL, texts=_TEXTS, tokenizer=function, batch_size=whole(1))
def embedding_cosine(
    model: nn.Module,
    dense: nn.Module,
    texts: Sequence[str],
    tokenizer: Callable[..., Any],
    *,
    batch_size: int = 64,
) -> float:
    """Return the mean cosine between the two models' embeddings of each text; 1 for equal models."""
    first = embed(model, texts, tokenizer, batch_size=batch_size)
    second = embed(dense, texts, tokenizer, batch_size=batch_size)
    return float((first * second.to(first)).sum(-1).mean())


@accepts(
    model=_MODEL,
    pairs=every(
        instance((list, tuple), "two strings", DataError),
        (list, tuple),
        "a list of pairs of strings",
        DataError,
    ),
    scores=every(number(error=DataError), (list, tuple), "a list of numbers", DataError),
    tokenizer=function,
    batch_size=whole(1),
)
def sts_spearman(
    model: nn.Module,
    pairs: Sequence[tuple[str, str]],
    scores: Sequence[float],
    tokenizer: Callable[..., Any],
    *,
    batch_size: int = 64,
) -> float:
    """Return Spearman's rank correlation of the pairs' cosines with people's ``scores``, in [-1, 1].

    Raises:
        DataError: If all scores or all cosines are equal, so that there is no correlation.

    Source: STS Benchmark, Cer et al. 2017 (arXiv:1708.00055).
    """
    if len(pairs) != len(scores) or any(len(pair) != 2 for pair in pairs):
        raise DataError(
            f"{len(pairs)} pairs and {len(scores)} scores: give a score for each pair of two texts."
        )
    texts = [text for pair in pairs for text in pair]
    embeddings = embed(model, texts, tokenizer, batch_size=batch_size)
    cosines = (embeddings[0::2] * embeddings[1::2]).sum(-1)
    return _rank_correlation(cosines=cosines.cpu(), scores=torch.tensor(scores, dtype=torch.float64))


@accepts(
    model=_MODEL,
    text=instance((str, Tensor), "a text, or its token ids", DataError),
    tokenizer=optional(function),
    window=whole(2),
    count=optional(whole(1, error=DataError)),
    batch_size=whole(1),
)
def perplexity(
    model: nn.Module,
    text: str | Tensor,
    tokenizer: Callable[..., Any] | None = None,
    *,
    window: int = 512,
    count: int | None = None,
    batch_size: int = 2,
) -> float:
    """Return the perplexity of a causal language model on one text, cut into windows without overlap.

    Args:
        model: A model that returns ``logits (batch, tokens, vocabulary)``.
        text: The text, or its token ids ``(tokens,)``.
        tokenizer: Needed for a text.
        window: Tokens per window; each window's first token is not predicted.
        count: How many windows, from the start; ``None`` means all.
        batch_size: Windows per forward pass.

    Raises:
        DataError: If the text is too short, comes without a tokenizer, or gets a loss that is not finite.
        LowRankError: If the perplexity is beyond the largest number.
    """
    adapter().check_tokenizer(model, tokenizer)
    ids = windows(text, tokenizer, tokens=window)
    if count is not None and not 1 <= count <= len(ids):
        raise DataError(f"The text has {len(ids)} windows of {window} tokens, not {count}.")
    ids = ids[:count].to(device_of(model))
    total = 0.0
    with evaluating(model):
        for index, chunk in enumerate(torch.split(ids, batch_size)):
            outputs = as_batch({"input_ids": chunk}, index).call(model)
            logits = _logits(model, outputs)[:, :-1].float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"
            )
            _check_finite_outputs(model, losses, index)
            total += float(losses)
    mean = total / (len(ids) * (window - 1))
    if mean > math.log(sys.float_info.max):
        raise LowRankError(f"The mean loss is {mean:,.0f}, and its exponential is beyond the largest number.")
    return math.exp(mean)


@accepts(
    model=_MODEL,
    texts=_TEXTS,
    labels=every(whole(error=DataError), (list, tuple), "a list of whole numbers", DataError),
    tokenizer=function,
    batch_size=whole(1),
)
def accuracy(
    model: nn.Module,
    texts: Sequence[str],
    labels: Sequence[int],
    tokenizer: Callable[..., Any],
    *,
    batch_size: int = 64,
) -> float:
    """Return the fraction of ``texts`` whose largest logit is at their label, in [0, 1].

    Raises:
        DataError: If there is not one label for each text, a label is none of the model's classes, or the
            logits are not finite.
    """
    adapter().check_tokenizer(model, tokenizer)
    right, start = 0, 0
    with evaluating(model):
        for batch in batches(texts, tokenizer, device=device_of(model), batch_size=batch_size):
            logits = _logits(model, batch.call(model))
            _check_finite_outputs(model, logits, batch.index)
            found = logits.argmax(-1)
            if start + len(found) > len(labels):
                raise DataError(f"{len(texts)} texts, but {len(labels)} labels: give a label for each text.")
            wanted = torch.tensor(labels[start : start + len(found)], device=found.device)
            if int(wanted.max()) >= logits.shape[-1]:
                raise DataError(
                    f"The label {wanted.max()} is none of the model's {logits.shape[-1]} classes."
                )
            right, start = right + int((found == wanted).sum()), start + len(found)
    if start != len(labels):
        raise DataError(f"{start} texts with tokens, but {len(labels)} labels.")
    return right / start


@accepts(model=_MODEL, dense=_MODEL, tokenizer=optional(function), batch_size=whole(1))
def loss_increase(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None = None,
    *,
    batch_size: int = 32,
) -> float:
    """Return by how much the objective of calibration has grown, per term, as `Plan.loss_increase` predicts.

    That is the mean KL divergence to the dense model's predictions, per sample or token of a language
    model; for encoders half the squared error of the embedding, for other models that of the output.

    Args:
        model: The compressed model.
        dense: The model that it was made from, on the same device.
        data: As for `lowrank.calibrate`.
        tokenizer: A tokenizer of transformers, for strings.
        batch_size: Strings per forward pass.
    """
    adapter().check_tokenizer(dense, tokenizer)
    total, terms = 0.0, 0
    with evaluating(model), evaluating(dense):
        for batch in batches(data, tokenizer, device=device_of(model), batch_size=batch_size):
            made = increase(batch.call(model), batch.call(dense), batch)
            _check_finite_outputs(model, made.total, batch.index)
            total, terms = total + float(made.total), terms + made.terms
    return total / max(1, terms)


@accepts(first=instance(Tensor, "a tensor", DataError), second=instance(Tensor, "a tensor", DataError))
def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors; ties share their mean rank.

    Raises:
        DataError: If they are no vectors of one length, or one of them is constant or not finite.
    """
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(
            f"first {tuple(first.shape)} and second {tuple(second.shape)}: give two vectors of one length."
        )
    return _rank_correlation(first=first, second=second)


def _rank_correlation(**vectors: Tensor) -> float:
    for name, values in vectors.items():
        if not bool(values.isfinite().all()):
            raise DataError(f"{name}: has NaN or infinite values, which have no rank.")
        if len(torch.unique(values)) < 2:
            raise DataError(
                f"{name}: all {len(values)} values are equal, so there is no rank correlation. Give others."
            )
    return float(torch.corrcoef(torch.stack([_ranks(values) for values in vectors.values()]))[0, 1])


def _check_finite_outputs(model: nn.Module, values: Tensor, batch: int) -> None:
    if not bool(values.isfinite().all()):
        raise DataError(
            f"Batch {batch}: {type(model).__name__} returns NaN or infinite values. The model is damaged, or "
            "overflows in half precision."
        )


def _logits(model: nn.Module, outputs: Any) -> Tensor:
    if not isinstance(outputs, Mapping) or "logits" not in outputs:
        raise DataError(
            f"{type(model).__name__} returns no logits. Load the checkpoint with its head: a causal language "
            "model for perplexity, a sequence classifier for accuracy."
        )
    logits: Tensor = outputs["logits"]
    return logits


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]

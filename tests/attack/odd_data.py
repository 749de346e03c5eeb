"""Odd data for every call that reads data: nothing wrong comes out, and the model is left as it was.

An attempt takes a tiny model in a random state (some modules training, some weights frozen), a few good
batches, makes some of them odd or puts them into an odd container, and makes one call. Either the result is
finite and has seen tokens, or the error is a `LowRankError` in a sentence, or the exception that the user's
own iterator or loss raised. After a failure, and after every call that only looks, the model, its hooks and
modes, and the global random states are what they were.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Attack, Broken
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowrank
from lowrank import LowRankError, Stats
from lowrank.reports import evaluation as measures

VOCABULARY, LONGEST, WIDTH = 40, 24, 16


class UserError(Exception):
    """What a user's own iterator or loss raises."""


@functools.cache
def dense(kind: str) -> nn.Module:
    """Return the model of a kind, built once."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            return BertModel(BertConfig(**sizes))
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes))
        return nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 8))


# --- data


def good(kind: str, rng: random.Random) -> Any:
    """Return one batch that the model takes."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    rows, tokens = rng.randint(1, 4), rng.randint(1, 8)
    if kind == "mlp":
        return torch.randn(rows * tokens, WIDTH, generator=generator)
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[rng.randrange(rows), rng.randint(1, tokens) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _like(change: Callable[[Tensor], Any]) -> Callable[[Any, random.Random], Any]:
    """Apply a change to the model's input, and to the mask where that has its shape."""

    def odd(batch: Any, rng: random.Random) -> Any:
        return change(batch) if isinstance(batch, Tensor) else {k: change(v) for k, v in batch.items()}

    return odd


def _key(name: str, make: Callable[[Tensor], Any]) -> Callable[[Any, random.Random], Any]:
    """Set a key of a dict, given its first tensor."""

    def odd(batch: Any, rng: random.Random) -> Any:
        first = batch if isinstance(batch, Tensor) else batch["input_ids"]
        return {**(batch if isinstance(batch, dict) else {"input": batch}), name: make(first)}

    return odd


def _value(value: float) -> Callable[[Any, random.Random], Any]:
    """Put one value into the model's input at a random place."""

    def odd(batch: Any, rng: random.Random) -> Any:
        whole = isinstance(batch, Tensor)
        first = (batch if whole else batch["input_ids"]).clone()
        if not whole and not (math.isfinite(value) and abs(value) < 2**62):
            embedded = torch.zeros(*first.shape, WIDTH)
            embedded[0, 0, rng.randrange(WIDTH)] = value
            return {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]}
        first.view(-1)[rng.randrange(first.numel())] = value if whole else int(value)
        return first if whole else {**batch, "input_ids": first}

    return odd


ODD: dict[str, Callable[[Any, random.Random], Any]] = {
    "no rows": _like(lambda x: x[:0]),
    "no columns": _like(lambda x: x[:, :0]),
    "mask of zeros": _key("attention_mask", lambda x: torch.zeros(x.shape[:2], dtype=torch.long)),
    "mask of NaN": _key("attention_mask", lambda x: torch.full(x.shape[:2], math.nan)),
    "mask of another shape": _key("attention_mask", lambda x: torch.ones(1, 3, dtype=torch.long)),
    "mask in four dimensions": _key("attention_mask", lambda x: torch.zeros(1, 1, 1, 1)),
    "no mask": lambda batch, rng: batch if isinstance(batch, Tensor) else {"input_ids": batch["input_ids"]},
    "NaN": _value(math.nan),
    "infinite": _value(math.inf),
    "beyond the vocabulary": _value(VOCABULARY),
    "far beyond": _value(2**40),
    "negative": _value(-1),
    "huge": _value(1e38),
    "subnormal": _like(lambda x: x * 1e-42 if x.is_floating_point() else x),
    "float64": _like(lambda x: x.double()),
    "float16": _like(lambda x: x.half()),
    "int32": _like(lambda x: x.int()),
    "bool": _like(lambda x: x.bool()),
    "complex": _like(lambda x: x.to(torch.complex64)),
    "sparse": _like(lambda x: x.to_sparse()),
    "on the meta device": _like(lambda x: x.to("meta")),
    "numpy": _like(lambda x: x.numpy()),
    "lists": _like(lambda x: x.tolist()),
    "one dimension": _like(lambda x: x.flatten()),
    "three dimensions": _like(lambda x: x[None]),
    "without dimensions": lambda batch, rng: torch.tensor(1.0),
    "another width": lambda batch, rng: torch.ones(3, 7),
    "strided": _like(lambda x: x.repeat_interleave(2, -1)[..., ::2]),
    "with a graph": _like(lambda x: x.requires_grad_() if x.is_floating_point() else x),
    "longer than positions": lambda batch, rng: (
        batch if isinstance(batch, Tensor) else {"input_ids": torch.ones(1, LONGEST + 1, dtype=torch.long)}
    ),
    "labels": _key("labels", lambda x: x),
    "strange labels": _key("labels", lambda x: torch.full(x.shape, 10**6)),
    "wrong key": lambda batch, rng: {"tokens": batch},
    "extra key": _key("colour", lambda x: x),
    "no keys": lambda batch, rng: {},
    "numbers for keys": lambda batch, rng: {1: batch},
    "an ordered dict": lambda batch, rng: OrderedDict(batch) if isinstance(batch, dict) else batch,
    "in a tuple": lambda batch, rng: (batch, torch.zeros(3)),
    "in a list": lambda batch, rng: [batch],
    "in ten lists": lambda batch, rng: [[[[[[[[[[batch]]]]]]]]]],
    "in many lists": lambda batch, rng: functools.reduce(lambda inner, _: [inner], range(2000), batch),
    "an empty tuple": lambda batch, rng: (),
    "None": lambda batch, rng: None,
    "a number": lambda batch, rng: 3,
    "a string": lambda batch, rng: "text",
    "bytes": lambda batch, rng: b"text",
    "a class": lambda batch, rng: Tensor,
}


class Words:
    """A tokenizer of bytes without special tokens, so that an empty string has none."""

    model_max_length = 10**30

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        one = isinstance(texts, str)
        longest = options.get("max_length", 64)
        rows = [
            [byte % self._vocabulary for byte in text.encode("utf-8")][:longest]
            for text in ([texts] if one else texts)
        ]
        ids: Any = rows[0] if one else rows
        return (
            {"input_ids": ids} if one else {"input_ids": ids, "attention_mask": [[1] * len(r) for r in ids]}
        )


STRINGS = ["", " ", "a", "one two", "a longer sentence of words", "\0", "ä", "\ud800", "x" * 100]


def strings(rng: random.Random) -> list[Any]:
    """Return sentences, some of them odd."""
    found: list[Any] = ["word " * rng.randint(1, 4) for _ in range(rng.choice([0, 1, 3, 40]))]
    for _ in range(rng.randint(0, 3)):
        found.insert(rng.randint(0, len(found)), rng.choice([*STRINGS, None, 3, b"x", ["x"]]))
    return found


def broken(items: list[Any], at: int) -> Iterator[Any]:
    """Yield some of the items, and raise."""
    yield from items[:at]
    raise UserError


def loaded(items: list[Any], size: int | None) -> Iterator[Any]:
    """Yield what a DataLoader makes of items, with a generator of its own; some it cannot put together."""
    try:
        yield from DataLoader(items, batch_size=size, generator=torch.Generator())
    except (RuntimeError, TypeError, RecursionError) as error:
        raise UserError from error


def contained(items: list[Any], rng: random.Random) -> Any:
    """Return the batches in what a user may have them in."""
    return rng.choice(
        [
            lambda: items,
            lambda: items,
            lambda: tuple(items),
            lambda: iter(items),
            lambda: (item for item in items),
            lambda: loaded(items, None),
            lambda: loaded(items, 1),
            lambda: broken(items, rng.randint(0, len(items))),
            lambda: [items],
            lambda: dict(enumerate(items)),
            lambda: items[0] if items else None,
        ]
    )()


# --- calls


def call_calibrate(model: nn.Module, data: Any, tokenizer: Any, rng: random.Random) -> Any:
    return lowrank.calibrate(model, data, tokenizer, rng.choice(["auto", "auto", None, raising, mean]))


def raising(outputs: Any, batch: Any) -> Tensor:
    """Raise from a user's loss."""
    raise UserError


def mean(outputs: Any, batch: Any) -> Tensor:
    """Return a user's loss."""
    tensor = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
    return tensor.float().square().mean()


def call_compress(model: nn.Module, data: Any, tokenizer: Any, rng: random.Random) -> Any:
    how = rng.choice([{"keep": 0.5}, {"rank": 2}, {"keep": 0.7, "quantize": "int8"}])
    return lowrank.compress(model, **how, data=data, tokenizer=tokenizer, round_to=1)


def call_sequential(model: nn.Module, data: Any, tokenizer: Any, rng: random.Random) -> Any:
    more = {"stats": known(layer_type_of(model))} if rng.random() < 0.5 else {}
    return lowrank.compress(
        model, keep=0.5, data=data, tokenizer=tokenizer, round_to=1, sequential=True, **more
    )


def call_recover(model: nn.Module, data: Any, tokenizer: Any, rng: random.Random) -> Any:
    options: dict[str, Any] = rng.choice([{}, {"hidden_weight": 0}, {"held_out": 1}, {"batch_size": 1}])
    return lowrank.recover(model, dense(layer_type_of(model)), data, tokenizer, steps=1, **options)


def call_measure(model: nn.Module, data: Any, tokenizer: Any, rng: random.Random) -> Any:
    teacher = dense(layer_type_of(model))
    if rng.random() < 0.5 or not isinstance(data, list):
        return measures.loss_increase(model, teacher, data, tokenizer)
    text = " ".join(item for item in data if isinstance(item, str))
    numbers = rng.choices([0, 1, 2.5, math.nan, -1, 10**9], k=3)
    return rng.choice(
        [
            lambda: measures.embedding_cosine(model, teacher, data, tokenizer),
            lambda: measures.sts_spearman(model, list(zip(data, data, strict=True)), numbers[:2], tokenizer),
            lambda: measures.accuracy(model, data, numbers, tokenizer),
            lambda: measures.perplexity(model, data, tokenizer, window=2),
            lambda: measures.perplexity(model, text, tokenizer, window=8),
        ]
    )()


CALLS = {
    "calibrate": call_calibrate,
    "compress": call_compress,
    "sequential": call_sequential,
    "recover": call_recover,
    "measure": call_measure,
}
ONLY_LOOKING = ("calibrate", "measure")


def layer_type_of(model: nn.Module) -> str:
    """Return the kind of a model of `dense`, also compressed."""
    return {"BertModel": "bert", "LlamaForCausalLM": "llama"}.get(type(model).__name__, "mlp")


@functools.cache
def known(kind: str) -> Stats:
    """Return statistics of good data."""
    rng = random.Random(0)
    return lowrank.calibrate(dense(kind), [good(kind, rng) for _ in range(8)])


@functools.cache
def small(kind: str) -> nn.Module:
    """Return the compressed model of a kind."""
    return lowrank.compress(copy.deepcopy(dense(kind)), rank=2)


# --- invariants


def state(model: nn.Module) -> list[Any]:
    """Return all that a call might change, but for values: these are in `values`."""
    modules = list(model.modules())
    return [
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [len(x) for m in modules for name, x in sorted(vars(m).items()) if name.endswith("hooks") and x],
    ]


def values(model: nn.Module) -> list[Tensor]:
    """Return all tensors of the model."""
    return [*model.parameters(), *model.buffers()]


def dice() -> list[Any]:
    """Return the global random states."""
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def check_result(found: Any, call: str, model: nn.Module, kind: str) -> None:
    """Refuse results that are not finite, or that come from nothing."""
    if isinstance(found, Stats):
        sums = [t for moments in found.inputs.values() for t in (moments.total, moments.products)]
        sums += [gradients.products for gradients in found.gradients.values()]
        sums += [tensor for table in found.embeddings.values() for tensor in table.tensors.values()]
        if found.tokens < 1 or not all(bool(t.isfinite().all()) for t in sums):
            raise Broken(f"Statistics of {found.tokens} tokens, finite or not.")
        try:
            increase = lowrank.plan(model, keep=0.5, stats=found, round_to=1).loss_increase
        except LowRankError:
            return
        if increase is not None and not math.isfinite(increase):
            raise Broken(f"The statistics predict an increase of {increase}.")
    elif isinstance(found, nn.Module):
        if not all(bool(t.isfinite().all()) for t in values(found) if t.is_floating_point()):
            raise Broken(f"{call} returns a model of which some parameters are not finite.")
    elif not math.isfinite(found):
        raise Broken(f"A measure is {found}.")


def check_error(error: Exception, odd: dict[int, str]) -> str:
    """Refuse errors of a foreign class, empty ones, and such as accuse a good batch."""
    if isinstance(error, UserError):
        return "the user's error passed"
    if not isinstance(error, LowRankError) or not str(error).strip():
        raise error
    accused = re.match(r"Batch (\d+)(?:, (\d+))*", str(error))
    if odd and accused and not {int(n) for n in re.findall(r"\d+", accused[0])} & odd.keys():
        raise Broken(f"Odd batches are {odd}, and the error says: {error}")
    return "refused"


def attempt(seed: int, folder: Path) -> str:
    """Make one call with odd data; see the top of this file."""
    rng = random.Random(seed)
    kind, call = rng.choice(["bert", "llama", "mlp"]), rng.choice(list(CALLS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy((small if call in ("recover", "measure") else dense)(kind))
        data, tokenizer, odd = _data(kind, rng)
        for module in rng.sample(list(model.modules()), rng.randint(0, 3)):
            module.training = not module.training
        for parameter in rng.sample(list(model.parameters()), rng.randint(0, 3)):
            parameter.requires_grad_(False)
        before, held, random_before = state(model), [t.clone() for t in values(model)], dice()
        teacher = dense(kind)
        its = state(teacher), [t.clone() for t in values(teacher)]
        failed = True
        try:
            found = CALLS[call](model, data, tokenizer, rng)
            failed = False
        except Exception as error:
            outcome = check_error(error, odd)
        if not failed:
            outcome = "answered"
            check_result(found, call, model, kind)
    if failed or call in ONLY_LOOKING:
        _check_same(f"{call} of {kind}", model, before, held)
    _check_same(f"the teacher of {call} of {kind}", teacher, *its)
    if dice() != random_before:
        raise Broken(f"{call} of {kind} changes a global random state.")
    return outcome


def _data(kind: str, rng: random.Random) -> tuple[Any, Any, dict[int, str]]:
    """Return data, a tokenizer, and by number which batches are odd, where that is what the call sees."""
    if kind != "mlp" and rng.random() < 0.25:
        return strings(rng), rng.choice([Words(VOCABULARY)] * 6 + [Words(999), None, len]), {}
    items = [good(kind, rng) for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 9]))]
    odd: dict[int, str] = {}
    for position in rng.sample(range(len(items)), min(len(items), rng.choice([0, 1, 1, 1, 2]))):
        odd[position] = rng.choice(list(ODD))
        try:
            items[position] = ODD[odd[position]](items[position], rng)
        except (RuntimeError, TypeError, IndexError):  # nothing of this kind can be made of that batch
            del odd[position]
    plain = rng.random() < 0.7
    return items if plain else contained(items, rng), None, odd if plain else {}


def _check_same(what: str, model: nn.Module, before: list[Any], held: list[Tensor]) -> None:
    if state(model) != before:
        raise Broken(f"{what}: modes, hooks, flags or layers have changed.")
    if not all(torch.equal(now, then) for now, then in zip(values(model), held, strict=True)):
        raise Broken(f"{what}: parameters have changed.")


ODD_DATA = Attack(
    "odd-data",
    "calibrate, compress, recover and evaluate tiny models on odd data: empty, masked, NaN, of wrong kinds",
    attempt,
)

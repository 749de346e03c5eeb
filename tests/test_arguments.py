"""Every argument of every public function is given wrong values: each is used, or named in an error."""

import copy
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank import (
    LatencyTable,
    LayerPlan,
    LowRankEmbedding,
    LowRankError,
    LowRankLinear,
    Plan,
    QuantizedEmbedding,
    QuantizedLinear,
    Stats,
    arguments,
)
from lowrank.calibration import objectives
from lowrank.calibration.data import as_batch
from lowrank.linalg import Scheme
from lowrank.reports import evaluation

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch about strange devices and dtypes

GENERATOR = torch.Generator().manual_seed(0)
DATA = [torch.randn(8, 32, generator=GENERATOR) for _ in range(5)]
WRONG = {
    "none": None, "true": True, "word": "junk", "nan": float("nan"), "inf": float("inf"), "negative": -1,
    "zero": 0, "half": 2.5, "list": [], "dict": {}, "path": Path("/dev/null/x"), "one": [1],
    "float32": np.float32(0.5), "int64": np.int64(3), "object": object(), "scalar": torch.tensor(1.0),
    "bytes": b"x", "null": "a\0b", "huge": 10**30, "module": nn.ReLU(),
    "array": np.array([1, 2]), "vector": torch.ones(2), "complex": 1j, "strange-list": [[], None],
}  # fmt: skip


def dense() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


class Reader(nn.Module):
    """A model of tokens with the outputs that evaluation asks for; the vocabulary has 9 words."""

    def __init__(self, classifies: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.classifies = nn.Embedding(9, 16), nn.Linear(16, 9), classifies

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        logits = self.head(hidden.mean(1) if self.classifies else hidden)
        return {"last_hidden_state": hidden, "logits": logits}


def tokenizer(texts, **options):
    if isinstance(texts, str):
        return {"input_ids": [1] * 40}
    return {
        "input_ids": [[1 + ord(text[0]) % 8, 2, 3] for text in texts],  # another for each of "a" to "d"
        "attention_mask": [[1, 1, 1] for _ in texts],
    }


SMALL = lowrank.compress(dense(), rank=4)
STATS = lowrank.calibrate(dense(), DATA)
PLAN = lowrank.plan(dense(), rank=4)
SPECTRA = lowrank.error_curves(dense())
TABLE = LatencyTable.here(dense())
small = partial(copy.deepcopy, SMALL)
factors = partial(dict, left=torch.randn(8, 2), right=torch.randn(2, 8))
reading = partial(dict, tokenizer=tokenizer, texts=["a", "b"])
Case = tuple[Callable[..., Any], Callable[[Path], dict[str, Any]]]


def summed(outputs, batch):
    return outputs.sum()


def models(at: Path, **others: Any) -> dict[str, Any]:
    return {"model": small(), "dense": dense(), **others}


def saved(write: Callable[[Path], Any], path: Path) -> Path:
    write(path)
    return path


CASES: dict[str, Case] = {
    "compress": (lowrank.compress, lambda at: {"model": dense(), "keep": 0.5, "data": DATA}),
    "compress-stats": (lowrank.compress, lambda at: {"model": dense(), "keep": 0.5, "stats": STATS}),
    "compress-rank": (lowrank.compress, lambda at: {"model": dense(), "rank": 4}),
    "compress-codes": (lowrank.compress, lambda at: {"model": dense(), "rank": 4, "quantize": "int8"}),
    "plan": (lowrank.plan, lambda at: {"model": dense(), "keep": 0.5, "stats": STATS}),
    "apply": (lowrank.apply, lambda at: {"model": dense(), "plan": PLAN}),
    "calibrate": (lowrank.calibrate, lambda at: {"model": dense(), "data": DATA}),
    "calibrate-text": (
        lowrank.calibrate,
        lambda at: {"model": Reader(), "data": ["a b"] * 40, "tokenizer": tokenizer},
    ),
    "quantize": (lowrank.quantize, lambda at: {"model": dense()}),
    "quantize-int4": (
        lowrank.quantize,
        lambda at: {"model": dense(), "scheme": "int4", "on_missing_kernel": "allow"},
    ),
    "decompress": (lowrank.decompress, lambda at: {"model": small()}),
    "error_curves": (lowrank.error_curves, lambda at: {"model": dense()}),
    "recover": (
        lowrank.recover,
        lambda at: {
            "model": small(),
            "teacher": dense(),
            "data": DATA,
            "steps": 1,
            "checkpoint_dir": at / "s",
        },
    ),
    "report": (lowrank.report, lambda at: {"model": small(), "dense": dense(), "data": DATA}),
    "benchmark": (
        lowrank.benchmark,
        lambda at: {"dense": dense(), "small": small(), "inputs": DATA[0], "repeats": 1, "warmup": 0},
    ),
    "save": (lowrank.save, lambda at: {"model": small(), "folder": at / "x"}),
    "load": (
        lowrank.load,
        lambda at: {
            "folder": saved(partial(lowrank.save, SMALL, overwrite=True), at / "x"),
            "model": dense(),
        },
    ),
    "Stats.save": (STATS.save, lambda at: {"folder": at / "stats"}),
    "Stats.load": (
        Stats.load,
        lambda at: {"folder": saved(partial(STATS.save, overwrite=True), at / "stats")},
    ),
    "Stats.moments": (STATS.moments, lambda at: {"layer": "0"}),
    "Stats.metric": (STATS.metric, lambda at: {"layer": "0", "metric": "inputs", "centred": True}),
    "Stats.lacks": (STATS.lacks, lambda at: {"layer": "0", "metric": "loss"}),
    "Stats.is_diagonal": (STATS.is_diagonal, lambda at: {"layer": "0", "metric": "loss"}),
    "Stats.loss_per_square": (STATS.loss_per_square, lambda at: {"layer": "0"}),
    "Stats.held_out_ratio": (STATS.held_out_ratio, lambda at: {"layer": "0"}),
    "Stats.merged": (STATS.merged, lambda at: {"owner": "0", "users": {"0": True, "2": True}}),
    "Stats.add": (STATS.__add__, lambda at: {"other": STATS}),
    "Plan": (Plan, lambda at: {"model": "M", "layers": PLAN.layers}),
    "Plan.save": (PLAN.save, lambda at: {"path": at / "plan.json"}),
    "Plan.load": (Plan.load, lambda at: {"path": saved(PLAN.save, at / "plan.json")}),
    "Plan.with_rank": (PLAN.with_rank, lambda at: {"pattern": "0", "rank": 3}),
    "Plan.with_layers": (PLAN.with_layers, lambda at: {"layers": {}}),
    "Plan.diff": (PLAN.diff, lambda at: {"other": PLAN}),
    "Plan.carried_out": (PLAN.carried_out, lambda at: {"found": PLAN}),
    "Plan.from_dict": (Plan.from_dict, lambda at: {"data": PLAN.to_dict()}),
    "Plan.from_json": (Plan.from_json, lambda at: {"text": PLAN.to_json()}),
    "LayerPlan": (
        LayerPlan,
        lambda at: {"name": "a", "layer_type": "linear", "in_features": 4, "out_features": 4, "bias": True},
    ),
    "LatencyTable": (LatencyTable, lambda at: {"environment": {}}),
    "LatencyTable.of": (
        TABLE.of,
        lambda at: {"layer": PLAN.layers[0], "tokens": 4, "like": torch.zeros(1)},
    ),
    "LatencyTable.save": (TABLE.save, lambda at: {"path": at / "table.json"}),
    "LatencyTable.load": (LatencyTable.load, lambda at: {"path": saved(TABLE.save, at / "table.json")}),
    "LowRankLinear": (LowRankLinear, lambda at: {"in_features": 8, "out_features": 8, "rank": 2}),
    "LowRankLinear.from_linear": (
        LowRankLinear.from_linear,
        lambda at: {"layer": nn.Linear(8, 8), "rank": 2},
    ),
    "LowRankLinear.from_factors": (LowRankLinear.from_factors, lambda at: factors()),
    "LowRankLinear.use_down_of": (
        lambda owner, same_input=True: LowRankLinear(8, 8, 2).share_down_with(owner, same_input),
        lambda at: {"owner": LowRankLinear(8, 8, 2, shared=True)},
    ),
    "LowRankEmbedding": (
        LowRankEmbedding,
        lambda at: {"num_embeddings": 8, "embedding_dim": 8, "rank": 2},
    ),
    "LowRankEmbedding.from_factors": (LowRankEmbedding.from_factors, lambda at: factors()),
    "QuantizedLinear": (
        QuantizedLinear,
        lambda at: {"in_features": 32, "out_features": 8, "bias": True, "scheme": Scheme("int8")},
    ),
    "QuantizedLinear.from_weight": (
        QuantizedLinear.from_weight,
        lambda at: {"weight": torch.ones(8, 32), "bias": None, "scheme": Scheme("int8")},
    ),
    "QuantizedEmbedding": (
        QuantizedEmbedding,
        lambda at: {"num_embeddings": 8, "embedding_dim": 32, "scheme": Scheme("int8")},
    ),
    "QuantizedEmbedding.from_embedding": (
        QuantizedEmbedding.from_embedding,
        lambda at: {"embedding": nn.Embedding(8, 32), "scheme": Scheme("int8")},
    ),
    "Scheme": (Scheme, lambda at: {"name": "int4", "group_size": 32}),
    "embed": (evaluation.embed, lambda at: {"model": Reader(), **reading()}),
    "embedding_cosine": (
        evaluation.embedding_cosine,
        lambda at: {"model": Reader(), "dense": Reader(), **reading()},
    ),
    "sts_spearman": (
        evaluation.sts_spearman,
        lambda at: {
            "model": Reader(),
            "pairs": [("a", "b"), ("c", "d")],
            "scores": [1.0, 2.0],
            "tokenizer": tokenizer,
        },
    ),
    "perplexity": (
        evaluation.perplexity,
        lambda at: {"model": Reader(), "text": torch.ones(40, dtype=torch.long), "window": 8},
    ),
    "perplexity-text": (
        evaluation.perplexity,
        lambda at: {"model": Reader(), "text": "a", "tokenizer": tokenizer, "window": 8},
    ),
    "accuracy": (evaluation.accuracy, lambda at: {"model": Reader(True), "labels": [0, 1], **reading()}),
    "loss_increase": (
        evaluation.loss_increase,
        lambda at: {"model": small(), "dense": dense(), "data": DATA},
    ),
    "spearman": (evaluation.spearman, lambda at: {"first": DATA[0][0], "second": DATA[0][1]}),
    "self_supervised": (
        objectives.self_supervised,
        lambda at: {"outputs": DATA[0], "batch": as_batch(DATA[0]), "generator": GENERATOR},
    ),
    "increase": (
        objectives.increase,
        lambda at: {"outputs": DATA[0], "targets": DATA[1], "batch": as_batch(DATA[0])},
    ),
    "of_loss": (
        objectives.of_loss,
        lambda at: {"loss": summed, "outputs": DATA[0].clone().requires_grad_(), "batch": as_batch(DATA[0])},
    ),
}

SAID_OTHERWISE = {
    "model": "model|layer|weight|linear|Reader|ReLU|factorized",
    "teacher": "model",
    "data": r"Batch \d|data|plan",
    "text": "text|tokens|JSON",
    "folder": "junk|/dev/null",
    "path": "junk|/dev/null",
    "texts": "data|texts",
    "small": "second model",
    "dense": "Batch|refuses|dense",
    "name": "quantize=",
    "pattern": "matches",
    "targets": "matches|targets|objective",
    "ignore": "matches|ignore",
    "outputs": "objective|loss",
    "layer_type": "layer_type",
    "checkpoint_dir": "checkpoint_dir|snapshots|/dev/null",
    "layer": "statistics do not have|no gradients of this layer|layer",
    "steps": "steps|duration",
}  # fmt: skip
"""Where the argument is understood, but what is there is not: the message is about that."""

OWN_ERRORS = {
    *((name, "loss") for name in ("calibrate", "calibrate-text", "compress", "of_loss")),
    ("of_loss", "outputs"),
}
"""A loss is the user's function: what it raises is not ours."""

ENDLESS = {("recover", "steps", "huge"), ("recover", "minutes", "half"), ("recover", "minutes", "huge")}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, one) for name, (call, _) in CASES.items() for one in inspect.signature(call).parameters],
)
def test_a_wrong_argument_gets_an_answer_or_an_error_that_names_it(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, right = CASES[name]
    for word, value in WRONG.items():
        if (name, argument, word) in ENDLESS:
            continue
        place = tmp_path / word
        place.mkdir()
        given = {**right(place), argument: value}
        before = {key: fingerprint(item) for key, item in given.items() if isinstance(item, nn.Module)}
        try:
            call(**given)
        except LowRankError as error:
            said = f"{argument}|{SAID_OTHERWISE.get(argument, argument)}"
            assert_says(str(error), said, f"{name}({argument}={value!r})")
            for key, was in before.items():
                assert fingerprint(given[key]) == was, f"{name}({argument}={value!r}) changed {key}"
        except Exception:
            if (name, argument) not in OWN_ERRORS:
                raise


def fingerprint(model: nn.Module) -> list[tuple[str, int, bool]]:
    return [(name, p._version, p.requires_grad) for name, p in model.named_parameters()]


def assert_says(message: str, said: str, case: str) -> None:
    assert re.search(said, message), f"{case}: {message}"


@pytest.mark.parametrize("name", CASES)
def test_the_right_arguments_are_accepted(name, tmp_path):
    call, right = CASES[name]
    call(**right(tmp_path))


def test_every_public_function_is_tried():
    functions = {
        name
        for name in lowrank.__all__
        if inspect.isfunction(getattr(lowrank, name)) and not name.startswith("plot")
    }
    assert functions <= CASES.keys()


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (arguments.whole(1, 9), 10, "x=10: give a whole number from 1 to 9."),
        (arguments.whole(1, 9), True, "x=True: give a whole number from 1 to 9."),
        (arguments.number(0), float("nan"), "x=nan: give a finite number of at least 0."),
        (arguments.number(0), 10**400, "x=1"),
        (arguments.number(above=0), 0, "x=0: give a finite number above 0."),
        (arguments.flag, 1, "x=1: give True or False."),
        (arguments.path(), 3, "x=3: give a path, as a string or a pathlib.Path."),
        (arguments.choice(("a", "b")), "c", "x='c': give one of 'a', 'b'."),
        (arguments.function, [], "x=list: give a function, or another object that can be called."),
        (arguments.every(arguments.text(), (list,), "strings"), ["a", 1], "x[1]=1: give a string."),
        (arguments.device, "gpu", "x=gpu: there is no such device here: "),
    ],
    ids=["large", "bool", "nan", "huge", "zero", "flag", "path", "choice", "function", "element", "device"],
)
def test_an_error_says_the_argument_its_value_and_what_to_give(check, value, message):
    with pytest.raises(LowRankError, match=f"^{re.escape(message)}"):
        check("x", value)


def test_numbers_of_numpy_are_numbers():
    given = arguments.whole()("x", np.int64(3)), arguments.number()("x", np.float32(0.5))
    assert given == (3, 0.5) and [type(value) for value in given] == [int, float]


def test_a_decorated_function_keeps_its_name_and_its_arguments():
    @arguments.accepts(size=arguments.whole(1))
    def area(size, by=2):
        """Say how large it is."""
        return size * by

    assert (area(np.int64(3), by=3), area.__name__, area.__doc__) == (9, "area", "Say how large it is.")
    assert list(inspect.signature(area).parameters) == ["size", "by"]
    with pytest.raises(TypeError, match="missing"):
        area()


def test_an_unknown_argument_is_named_with_the_function():
    with pytest.raises(
        TypeError, match=r"^compress\(\): got an unexpected keyword argument 'kep'\. Did you mean keep=\?$"
    ):
        lowrank.compress(dense(), kep=0.5)

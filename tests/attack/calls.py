"""The public calls in any order, with random arguments, on the modules of the zoo.

Each step makes a call in a `Session`. One that fails must fail with an error of this library, and leave all
as it was; after one that succeeds, the model must keep the promises of `promises`.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from draws import ODD, Arguments, maybe, one, pattern, request, selection, spoiled
from harness import Broken
from promises import (
    OWN,
    Outputs,
    bits,
    called,
    check_errors,
    demand,
    dense_weights,
    distance,
    evaluating,
    finite,
    floating,
    outputs_of,
)
from session import SURROUNDINGS, Session
from states import data_of, difference
from torch import nn
from zoo import ZOO

import lowrank
from lowrank import Plan, Stats, WeightError
from lowrank.nn import LowRankLinear
from lowrank.reports.report import Report

CALLS = 12
"""How many calls one attempt makes."""


Step = Callable[[Session, Random], None]


def compress(session: Session, random: Random) -> None:
    """Compress the model, with everything that can be asked for."""
    arguments = request(random, session.layers, session.bytes)
    if session.stats is not None and maybe(random, 0.5):
        arguments["stats"] = session.stats
    elif maybe(random, 0.2):
        arguments["data"] = session.batches(random)
        arguments |= {"loss": None} if maybe(random, 0.2) else {}
        arguments |= {"sequential": True} if maybe(random, 0.4) else {}
    if "overrule" in arguments or maybe(random, 0.02):
        arguments["inputs"] = session.specimen.batch(3)
    if arguments.get("quantize") == "int4":
        arguments["on_missing_kernel"] = one(random, "allow", "allow", "refuse")
    arguments = spoiled(
        random,
        arguments,
        ("seed", "data", "tokenizer", "loss", "stats", "inputs", "offload_folder", "progress"),
    )
    before, was, twin = dense_weights(session.model), _compressed(session.model), None
    if "data" not in arguments and maybe(random, 0.15):
        twin = copy.deepcopy(session.model)
    done, result = session.call(lowrank.compress, session.model, **arguments)
    if done:
        demand(result is session.model, "compress returns another model.")
        if "stats" not in arguments and "data" not in arguments:
            check_errors(session.model, before)
        if not was:
            _meets(session, arguments)
        if twin is not None:
            _same_by_plan(session, twin, arguments)
        session.check(random)


def _same_by_plan(session: Session, twin: nn.Module, arguments: Arguments) -> None:
    """Deciding first and acting afterwards gives the same, to the bit."""
    options = {
        name: value
        for name, value in arguments.items()
        if name in ("stats", "seed", "on_missing_kernel", "progress")
    }
    others = "seed", "on_missing_kernel", "sequential", "loss", "tokenizer", "offload_folder"
    asked = {name: value for name, value in arguments.items() if name not in others}
    done, made = session.call(lowrank.plan, twin, reads=True, **asked)
    if isinstance(made, WeightError):
        return  # plan decomposes layers as well that compress leaves dense
    demand(done, f"plan refuses what compress has done: {made}")
    done, error = session.call(lowrank.apply, twin, made, **options)
    demand(done, f"apply refuses what compress has done: {error}")
    found = difference(*({k: bits(v) for k, v in m.state_dict().items()} for m in (session.model, twin)))
    demand(found is None, f"compress gives another model than plan and apply: {found}")


def _compressed(model: nn.Module) -> bool:
    return any(isinstance(module, OWN) for module in model.modules())


def _meets(session: Session, arguments: Arguments) -> None:
    """The model is as small as the budget asks."""
    limit = arguments.get("max_bytes")
    if limit is not None:
        demand(session.bytes <= limit, f"The model has {session.bytes} bytes, more than max_bytes={limit}.")
    rank = arguments.get("rank")
    if isinstance(rank, int) and not arguments.get("share") and arguments.get("quantize") != "int4":
        for name, module in session.model.named_modules():
            if isinstance(module, LowRankLinear):
                demand(module.rank == rank, f"{name} has rank {module.rank}, not {rank}.")


def plan(session: Session, random: Random) -> None:
    """Decide only; the plan survives its file."""
    arguments = request(random, session.layers, session.bytes)
    if session.stats is not None and maybe(random, 0.5):
        arguments["stats"] = session.stats
    if "overrule" in arguments:
        arguments["inputs"] = session.specimen.batch(3)
    elif maybe(random, 0.02):
        arguments = {"speedup": 1.1, "inputs": session.specimen.batch(3), "round_to": 1}
    arguments = spoiled(random, arguments, ("stats", "inputs", "latencies", "progress"))
    done, made = session.call(lowrank.plan, session.model, reads=True, **arguments)
    if done:
        demand(Plan.from_json(made.to_json()) == made, "A plan differs after JSON.")
        demand(str(made) != "" and not made.diff(made), "A plan differs from itself.")
        session.plan = made
        if maybe(random, 0.5):
            apply_at_once(session, random, arguments.get("stats"))


def apply_at_once(session: Session, random: Random, stats: Stats | None) -> None:
    """Carry out a plan that was made for the model as it is: that must work."""
    before = dense_weights(session.model)
    done, error = session.call(lowrank.apply, session.model, session.plan, stats, on_missing_kernel="allow")
    frozen_for_good = session.specimen.name == "in inference mode"  # it can be planned, but not changed
    demand(done or frozen_for_good, f"A plan for this very model is refused: {error}")
    if not done:
        return
    if stats is None:
        check_errors(session.model, before)
    session.check(random)


def edit(session: Session, random: Random) -> None:
    """Change a plan by hand."""
    if session.plan is None:
        return
    rank: Any = one(random, None, 1, 2, 4, 8, 100)
    named = spoiled(random, {"pattern": pattern(random, session.layers), "rank": rank})
    done, made = session.call(session.plan.with_rank, reads=True, **named)
    if done:
        demand(Plan.from_json(made.to_json()) == made, "An edited plan differs after JSON.")
        session.plan = made


def store_plan(session: Session, random: Random) -> None:
    """Write a plan to a file and read it."""
    if session.plan is None:
        return
    path = session.path("plan")
    arguments = spoiled(random, {"path": path})
    done, _ = session.call(session.plan.save, **arguments, reads=True, writes=True)
    if done and arguments["path"] is path:
        done, read = session.call(Plan.load, path, reads=True)
        demand(done and read == session.plan, "A plan differs after its file.")


def apply(session: Session, random: Random) -> None:
    """Carry out a plan that may be old or edited."""
    if session.plan is None:
        return
    arguments: Arguments = {"plan": session.plan}
    arguments |= {"stats": session.stats} if session.stats is not None and maybe(random, 0.6) else {}
    arguments |= {"sequential": True, "data": session.batches(random)} if maybe(random, 0.15) else {}
    arguments |= {"on_missing_kernel": "allow"}
    arguments = spoiled(
        random, arguments, ("data", "seed", "offload_folder", "on_missing_kernel", "tokenizer")
    )
    done, result = session.call(lowrank.apply, session.model, **arguments)
    if done:
        demand(result is session.model, "apply returns another model.")
        session.check(random)


def calibrate(session: Session, random: Random) -> None:
    """Learn statistics; they survive their files, and add up."""
    arguments: Arguments = {"data": session.batches(random)}
    arguments |= {"loss": None} if maybe(random, 0.3) else {}
    arguments |= selection(random, session.layers)
    arguments = spoiled(
        random, arguments, ("tokenizer", "loss", "device", "batch_size", "max_length", "seed")
    )
    done, stats = session.call(lowrank.calibrate, session.model, reads=True, **arguments)
    if done:
        session.stats = stats
        if maybe(random, 0.3):
            store_stats(session, random)
        if maybe(random, 0.2):
            done, both = session.call(lambda: stats + stats, reads=True)
            demand(done and both.tokens == 2 * stats.tokens, "Statistics do not add up.")


def store_stats(session: Session, random: Random) -> None:
    """Write statistics to a folder and read them."""
    if session.stats is None:
        return
    folder = session.path("stats")
    arguments = spoiled(random, {"folder": folder})
    done, _ = session.call(session.stats.save, **arguments, reads=True, writes=True)
    if done and arguments["folder"] is folder:
        done, read = session.call(Stats.load, folder, reads=True)
        demand(
            done and data_of(read) == data_of(session.stats), f"Statistics differ after their files: {read}"
        )


def quantize(session: Session, random: Random) -> None:
    """Code weights."""
    arguments: Arguments = {"scheme": one(random, "int8", "int8", "int4")}
    if arguments["scheme"] == "int4":
        arguments |= {
            "on_missing_kernel": one(random, "allow", "allow", "refuse"),
            "group_size": one(random, 4, 8, None),
        }
    arguments |= selection(random, session.layers)
    arguments |= {"stats": session.stats} if session.stats is not None and maybe(random, 0.4) else {}
    arguments = spoiled(random, arguments, ("group_size", "stats", "on_missing_kernel", "seed", "progress"))
    before = _outputs(session)
    done, _ = session.call(lowrank.quantize, session.model, **arguments)
    if done:
        if arguments["scheme"] == "int8" and before is not None and finite(before):
            separately_saved = distance(_outputs(session) or [], before)
            few = "stats" in arguments and session.stats is not None and session.stats.tokens < FEWEST_TOKENS
            demand(
                few or separately_saved < 0.1,
                f"int8 moves the outputs by {separately_saved:.3g} of their size.",
            )
        session.check(random)


FEWEST_TOKENS = 200
"""Of fewer the scales of inputs fit these tokens and no others, of which `FewTokensWarning` tells."""


def _outputs(session: Session, exact: bool = False) -> Outputs | None:
    """Return the outputs, with ``exact`` as they are with gradients: inputs are not rounded then."""
    runs = session.specimen.runs and list(session.model.children())
    if not runs:
        return None
    if not exact or any(parameter.is_inference() for parameter in session.model.parameters()):
        return outputs_of(session.model, session.specimen.batch(7))
    with evaluating(session.model), torch.enable_grad():
        return [output.detach() for output in floating(called(session.model, session.specimen.batch(7)))]


def decompress(session: Session, random: Random) -> None:
    """Undo; only rounding may be left, and not that of what layers of integers read."""
    before = _outputs(session, exact=True)
    done, _ = session.call(lowrank.decompress, session.model)
    if done:
        demand(not _compressed(session.model), "decompress leaves layers.")
        after = _outputs(session)
        if before is not None and after is not None and finite(before):
            separately_saved = distance(after, before)
            demand(
                separately_saved < 0.1,
                f"decompress moves the outputs by {separately_saved:.3g} of their size.",
            )
        _as_dense(session)
        session.check(random)


def _as_dense(session: Session) -> None:
    """Modules and parameters are those of the dense model, but for values and added biases."""
    dense = session.specimen.architecture()
    types = [
        {name: type(m).__name__ for name, m in model.named_modules()} for model in (dense, session.model)
    ]
    demand(types[0] == types[1], f"decompress leaves other modules: {difference(*types)}")
    shapes = [
        {n: (tuple(p.shape), p.dtype) for n, p in m.named_parameters(remove_duplicate=False)}
        for m in (dense, session.model)
    ]
    more = shapes[1].keys() - shapes[0].keys()
    demand(all(name.endswith("bias") for name in more), f"decompress leaves more parameters: {more}.")
    for name, about in shapes[0].items():
        demand(
            shapes[1].get(name) == about,
            f"{name} was {about}, and is {shapes[1].get(name)} when dense again.",
        )


def recover(session: Session, random: Random) -> None:
    """Train a step or two."""
    data = [session.specimen.batch(random.randint(1, 4)) for _ in range(random.randint(2, 4))]
    arguments: Arguments = {"teacher": session.dense, "data": data, "steps": random.randint(1, 2)}
    arguments |= {"blockwise": True, "steps": 4} if maybe(random, 0.2) else {}
    arguments |= {"qat": False} if maybe(random, 0.2) else {}
    arguments |= {"hidden_weight": 0.0} if maybe(random, 0.2) else {}
    arguments |= {"mixed_precision": True} if maybe(random, 0.1) else {}
    names = (
        "learning_rate",
        "held_out",
        "seed",
        "checkpoint_dir",
        "batch_size",
        "minutes",
        "tokenizer",
        "progress",
    )
    arguments = spoiled(random, arguments, names)
    if isinstance(arguments.get("minutes"), (int, float)) or not 1 <= _number(arguments["steps"]) <= 4:
        return  # that would take its time
    done, result = session.call(lowrank.recover, session.model, writes=True, **arguments)
    if done:
        demand(result is session.model, "recover returns another model.")
        session.check(random)


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 1


def report(session: Session, random: Random) -> None:
    """Count what the model costs."""
    arguments: Arguments = {}
    if maybe(random, 0.3):
        arguments |= {"dense": session.dense, "data": session.batches(random)}
    if session.plan is not None and maybe(random, 0.3):
        arguments["plan"] = session.plan
    arguments = spoiled(random, arguments, ("plan", "dense", "data", "tokenizer"))
    done, made = session.call(lowrank.report, session.model, reads=True, **arguments)
    if done:
        demand(bool(str(made)) and bool(made.to_json()), "A report is empty.")
        if maybe(random, 0.3):
            _counts(session, made)


def _counts(session: Session, made: Report) -> None:
    """What a report says of the file and of parameters is true."""
    folder = session.path("counted")
    done, _ = session.call(lowrank.save, session.model, folder, reads=True, writes=True)
    file = folder / "model.safetensors"
    if done and file.exists():
        found = file.stat().st_size
        demand(
            found == made.checkpoint_bytes, f"The file has {found} bytes, the report {made.checkpoint_bytes}."
        )
    if not _compressed(session.model):
        count = sum(parameter.numel() for parameter in session.model.parameters())
        demand(count == made.parameters, f"There are {count} parameters, the report has {made.parameters}.")


def save(session: Session, random: Random) -> None:
    """Write the model, and read it into a new one that goes on in its place."""
    folder = session.path("model") if maybe(random, 0.7) else session.folder / "model"
    arguments = spoiled(random, {"folder": folder, "overwrite": maybe(random, 0.5)})
    done, _ = session.call(lowrank.save, session.model, reads=True, writes=True, **arguments)
    if not done or arguments["folder"] is not folder:
        return
    demand(any((folder / name).exists() for name in ("lowrank.json", "config.json")), "save writes nothing.")
    if (folder / "lowrank.json").exists() and maybe(random, 0.5):
        model = session.specimen.architecture()
        done, loaded = session.call(lowrank.load, folder, model, reads=True)
        demand(done, f"What was saved is refused: {loaded}")
        session.model = loaded
        session.check(random)


def load(session: Session, random: Random) -> None:
    """Load something into the model as it is now, which mostly does not fit."""
    folders = [folder for folder in session.folder.iterdir() if folder.is_dir()] or [session.folder]
    arguments = spoiled(random, {"folder": one(random, *folders), "model": session.model})
    done, _ = session.call(lowrank.load, **arguments)
    if done:
        session.check(random)


def error_curves(session: Session, random: Random) -> None:
    """Decompose every weight."""
    arguments: Arguments = selection(random, session.layers)
    arguments |= {"stats": session.stats} if session.stats is not None and maybe(random, 0.5) else {}
    arguments = spoiled(random, arguments, ("stats", "metric", "add_bias", "progress"))
    session.call(lowrank.error_curves, session.model, reads=True, **arguments)


def benchmark(session: Session, random: Random) -> None:
    """Measure the model beside the dense one."""
    arguments: Arguments = {"inputs": session.specimen.batch(2), "repeats": 1, "warmup": 0}
    arguments = spoiled(random, arguments)
    if _number(arguments["repeats"]) > 3 or _number(arguments["warmup"]) > 3:
        return
    done, made = session.call(lowrank.benchmark, session.dense, session.model, reads=True, **arguments)
    if done:
        demand(bool(str(made)) and bool(made.to_json()), "A benchmark is empty.")


def misuse(session: Session, random: Random) -> None:
    """Pass nonsense in place of the model."""
    names = (
        "compress",
        "plan",
        "calibrate",
        "quantize",
        "decompress",
        "report",
        "error_curves",
        "save",
        "recover",
    )
    name, odd = one(random, *names), one(random, *ODD)
    if isinstance(odd, nn.Module):
        return
    needed: Arguments = {
        "compress": {"rank": 2},
        "plan": {"keep": 0.5},
        "calibrate": {"data": session.batches(random)},
        "save": {"folder": session.path("odd")},
        "recover": {"teacher": session.dense, "data": session.batches(random), "steps": 1},
    }
    done, _ = session.call(getattr(lowrank, name), odd, reads=True, **needed.get(name, {}))
    demand(not done, f"{name} takes {odd!r} for a model.")


def unknown(session: Session, random: Random) -> None:
    """Pass an argument that there is not: only that is a `TypeError`."""
    function = one(random, lowrank.compress, lowrank.plan, lowrank.quantize, lowrank.recover, lowrank.save)
    before = session.state()
    try:
        function(session.model, ranks=4)  # type: ignore[operator]
    except TypeError:
        session.outcomes["TypeError"] += 1
    else:
        raise Broken(f"{function.__name__} takes an argument that there is not.")
    found = difference(before, session.state())
    demand(found is None, f"An unknown argument changes something: {found}")


def train(session: Session, random: Random) -> None:
    """Do what users do between calls: change modes, gradients and weights."""
    what = one(random, "eval", "train", "freeze", "step", "anew", "anew")
    session.trace.append(what)
    model = session.model
    if what == "anew":
        session.restart()
    elif what == "freeze":
        for parameter in model.parameters():
            if not nn.parameter.is_lazy(parameter):
                parameter.requires_grad_(False)
        session.trainable = dict.fromkeys(session.trainable, False)
    elif what == "eval":
        model.eval()
    elif what == "step" and session.specimen.trains and session.specimen.runs:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)


STEPS: tuple[tuple[Step, int], ...] = (
    *((compress, 20), (plan, 10), (edit, 5), (store_plan, 2), (apply, 8), (calibrate, 9), (store_stats, 2)),
    *((quantize, 10), (decompress, 9), (recover, 5), (report, 6), (save, 6), (load, 5), (error_curves, 3)),
    *((benchmark, 2), (misuse, 2), (unknown, 1), (train, 6)),
)
"""What can be called, and how often beside the others."""

KNOWN: frozenset[str] = frozenset()
"""Modules with faults that are known and not mended yet."""


def attempt(seed: int, folder: Path) -> Counter[str]:
    """Make some calls on one module of the zoo."""
    random = Random(seed)
    names = [name for name in ZOO if name not in KNOWN]
    (name,) = random.choices(names, [ZOO[name].weight for name in names])
    session = Session(ZOO[name], folder / "calls")
    steps, weights = zip(*STEPS, strict=True)
    while session.outcomes.total() < CALLS:
        (step,) = random.choices(steps, weights)
        take(session, step, random)
    return session.outcomes


def take(session: Session, step: Step, random: Random) -> None:
    """Take one step; a broken promise tells what has happened before it."""
    session.where = one(random, *SURROUNDINGS) if maybe(random, 0.1) else ""
    try:
        step(session, random)
    except Broken as error:
        raise Broken(f"{error}\n{story(session)}") from error
    except Exception as error:
        raise Broken(f"{traceback.format_exc()}\n{story(session)}") from error


def story(session: Session) -> str:
    """Return what has been called, line by line."""
    return "\n".join([f"On the module {session.specimen.name!r}:", *(f"  {line}" for line in session.trace)])

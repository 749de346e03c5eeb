"""One module of the zoo under attack: a `Session` makes calls, and sees what each must leave as it was."""

from __future__ import annotations

import itertools
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from draws import maybe, odd_data, one
from harness import Broken
from promises import CHECKS, OWN, Case, demand
from states import State, data_of, difference, files_of, globals_of, state_of
from torch import nn
from zoo import Specimen

from lowrank import LowRankError, Plan, Stats


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make ``folder`` the working directory for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Session:
    """One module of the zoo, and what the calls on it have given."""

    def __init__(self, specimen: Specimen, folder: Path) -> None:
        self.specimen = specimen
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outcomes: Counter[str] = Counter()
        self.trace: list[str] = []
        self.numbers = itertools.count()
        self.dense = specimen.build()
        self.stats: Stats | None = None
        self.plan: Plan | None = None
        self.where = ""
        self.restart()

    def restart(self) -> None:
        """Begin anew with the module as it was."""
        self.model = self.specimen.build()
        self.trainable = {name: p.requires_grad for name, p in self._parameters()}
        self.trace.append("begin anew")

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters(remove_duplicate=False)

    @property
    def layers(self) -> list[str]:
        """The names of modules that a pattern may mean."""
        kinds = (nn.Linear, nn.Embedding, *OWN)
        return [name for name, module in self.model.named_modules() if isinstance(module, kinds) and name]

    @property
    def bytes(self) -> int:
        """The bytes of parameters and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.nbytes for t in tensors if not nn.parameter.is_lazy(t)) or 1

    def batches(self, random: Random) -> Any:
        """Return data for a calibration: mostly a list of good batches."""
        good = [self.specimen.batch(random.randint(1, 6)) for _ in range(random.randint(1, 4))]
        return odd_data(random, good) if maybe(random, 0.1) else good

    def state(self) -> State:
        """Return all that a failed call must leave as it was."""
        parts = {"model": state_of(self.model), "dense model": state_of(self.dense), "process": globals_of()}
        parts["statistics"] = {"statistics": data_of(self.stats)}
        parts["plan"] = {"plan": data_of(self.plan)}
        parts["folder"] = files_of(self.folder)
        return {f"{part}: {name}": value for part, state in parts.items() for name, value in state.items()}

    def call(
        self,
        function: Callable[..., Any],
        *given: Any,
        reads: bool = False,
        writes: bool = False,
        **named: Any,
    ) -> tuple[bool, Any]:
        """Make one call; return whether it succeeded, and what it gave.

        Args:
            function: What is called with ``given`` and ``named``.
            reads: Whether it must leave everything as it was also when it succeeds.
            writes: Whether it may write files when it succeeds.
        """
        name = getattr(function, "__qualname__", repr(function))
        arguments = [_short(value) for value in given] + [
            f"{key}={_short(value)}" for key, value in named.items()
        ]
        self.trace.append(f"{self.where}{name}({', '.join(arguments)})")
        before = self.state()
        try:
            with working_in(self.folder), SURROUNDINGS[self.where]():  # nonsense may be a relative path
                result = function(*given, **named)
        except LowRankError as error:
            self.trace[-1] += f"  → {type(error).__name__}: {error}"
            self._unchanged(before, self.state(), "A failed call changes something.")
            demand(len(str(error).split()) > 3, f"This is no sentence: {type(error).__name__}({error!s}).")
            self.outcomes[type(error).__name__] += 1
            return False, error
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-6:]
            raise Broken(
                f"A foreign error: {type(error).__name__}: {error}\n{''.join(traceback.format_list(last))}"
            ) from error
        after = self.state()
        if not reads:
            self._as_before(before, after)
            before = {key: value for key, value in before.items() if not key.startswith("model: ")}
            after = {key: value for key, value in after.items() if not key.startswith("model: ")}
        if writes:
            before = {key: value for key, value in before.items() if not key.startswith("folder: ")}
            after = {key: value for key, value in after.items() if not key.startswith("folder: ")}
        self._unchanged(before, after, "A call changes what it must not.")
        self.outcomes["done"] += 1
        return True, result

    def _unchanged(self, before: State, after: State, sentence: str) -> None:
        found = difference(before, after)
        demand(found is None, f"{sentence} {found}")

    def _as_before(self, before: State, after: State) -> None:
        """What keeps its name keeps its mode and its hooks, whatever it is replaced by."""
        for key in before.keys() & after.keys():
            if key.startswith("model: ") and (key.endswith(": training") or "hooks" in key):
                demand(before[key] == after[key], f"A call changes {key}: {before[key]}, then {after[key]}.")

    def path(self, name: str) -> Path:
        """Return a new path in the session's folder."""
        return self.folder / f"{name}{next(self.numbers)}"

    def check(self, random: Random) -> None:
        """Check some of the promises that a model keeps."""
        if not self.specimen.runs or not list(self.model.children()):
            return
        batch = self.specimen.batch(one(random, 3, 1, 20))
        for name, (chance, check) in CHECKS.items():
            if maybe(random, chance):
                self.trace.append(f"check: {name}")
                check(Case(self.model, self.dense, self.specimen, batch, self.path("saved")))
                self.trace.pop()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "without gradients ": torch.no_grad,
    "under autocast ": lambda: torch.autocast("cpu", torch.bfloat16),
    "by default float64 ": lambda: default_dtype(torch.float64),
    "by default bfloat16 ": lambda: default_dtype(torch.bfloat16),
}
"""Where a call may be made; that is to make no difference."""


def _short(value: Any) -> str:
    if isinstance(value, (nn.Module, Plan, Stats)):
        return type(value).__name__
    text = repr(value)
    return text if len(text) < 120 else f"{text[:100]} …"

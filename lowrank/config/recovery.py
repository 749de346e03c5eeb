"""The options of recovery: how long and how `lowrank.recover` trains a compressed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from lowrank.arguments import SEED, flag, is_real, is_whole, number, optional, whole
from lowrank.config.options import check_options, option
from lowrank.errors import LowRankError


class RecoveryOptions(TypedDict, total=False):
    """The options of recovery, as keywords: the fields of `RecoveryConfig`."""

    minutes: float | None
    steps: int | None
    learning_rate: float
    hidden_weight: float
    mixed_precision: bool | None
    held_out: int | None
    blockwise: bool
    qat: bool
    batch_size: int
    max_length: int | None
    seed: int


def _positive(name: str, value: Any) -> float:
    if not is_real(value) or not value > 0:
        raise LowRankError(f"{name}={value!r}: give a positive number, such as 3e-4.")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How a compressed model is trained towards its teacher; each field says in its help what it does.

    Give it to `lowrank.recover` as ``config``, or its fields as keywords.

    Raises:
        LowRankError: If an option is out of its range.
    """

    minutes: float | None = option(
        None, "How long, looking at held-out batches included. Give either this or steps."
    )
    steps: int | None = option(None, "How many batches to train on, in each process.")
    learning_rate: float = option(
        3e-4,
        "Its peak; it rises over the first twentieth and falls to zero as a cosine.",
        check=_positive,
    )
    hidden_weight: float = option(
        1.0, "How much hidden states count beside the outputs; 0 spares them.", check=number(0)
    )
    mixed_precision: bool | None = option(
        None,
        "Whether matrix products run in bfloat16 (torch.autocast); by default where the processor has "
        "instructions for that, three times as fast. Parameters stay as they are.",
        check=optional(flag),
    )
    held_out: int | None = option(
        None,
        "Batches not trained on, which choose the state that is kept; by default a sixteenth, at most 8.",
        check=optional(whole(1)),
    )
    blockwise: bool = option(
        False,
        "Train one block after the other towards the teacher's hidden states, each for an even share of "
        "the time, where gradients of the whole model do not fit. Nothing outside of the stack of blocks "
        "is trained.",
        check=flag,
    )
    qat: bool = option(
        True,
        "Whether quantized weights of linear layers are trained, too: as floating-point weights that are "
        "rounded in every forward pass, which take the memory of dense ones meanwhile.",
        check=flag,
    )
    batch_size: int = option(32, "Strings per batch.", check=whole(1))
    max_length: int | None = option(
        None,
        "Longest string in tokens; by default what the tokenizer allows, at most 512.",
        check=optional(whole(1)),
    )
    seed: int = option(0, "Seed of the order of batches; the global random state is not touched.", check=SEED)

    def __post_init__(self) -> None:
        check_options(self)
        if is_whole(self.steps):
            object.__setattr__(self, "steps", int(self.steps))  # type: ignore[arg-type]
        minutes, steps = self.minutes, self.steps
        if (minutes is None) == (steps is None):
            raise LowRankError(f"Give either minutes or steps; got minutes={minutes!r} and steps={steps!r}.")
        if steps is not None and not is_whole(steps):
            raise LowRankError(f"steps={steps!r}: give a whole number of batches.")
        duration = minutes if minutes is not None else steps
        if not is_real(duration) or not duration > 0:  # type: ignore[operator]
            raise LowRankError(f"minutes={minutes!r}, steps={steps!r}: the duration must be positive.")

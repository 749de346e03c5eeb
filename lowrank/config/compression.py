"""The options of compression: what `compress`, `plan`, the command line and `LowRankConfig` are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lowrank.arguments import SEED, flag, number, optional, path, patterns, some_of, text, whole
from lowrank.config.budget import Budget
from lowrank.config.options import check_options, option
from lowrank.errors import BudgetError, DataError, SchemeError, TargetError
from lowrank.linalg import Scheme

METRICS = ("weight", "diagonal", "inputs", "loss")
"""What an error can measure, from what knows the least about the data to what knows the most."""

ON_MISSING_KERNEL = ("warn", "refuse", "allow")
"""What may be done about int4 weights that no kernel multiplies."""

_NO_INPUTS = {"LowRankConfig": "from_pretrained has no inputs to measure on"}
_NO_DATA = {"LowRankConfig": "from_pretrained has no data"}
_CARRIED_OUT = {"plan": "it concerns carrying a plan out: give it to apply"}


class PlanOptions(TypedDict, total=False):
    """The options of a plan, as keywords: the fields of `CompressionConfig` that decide something."""

    rank: int | Mapping[str, int] | None
    keep: float | None
    energy: float | None
    error: float | None
    max_bytes: int | None
    speedup: float | None
    metric: str
    add_bias: bool
    targets: Sequence[str] | None
    ignore: Sequence[str] | None
    overrule: Sequence[str] | None
    forms: Sequence[str] | None
    allocation: str
    round_to: int
    share: str | None
    share_size: int | None
    quantize: str | None
    group_size: int | None
    correction: bool
    tolerance: float


class CompressionOptions(PlanOptions, total=False):
    """The options of compression, as keywords: the fields of `CompressionConfig`."""

    sequential: bool
    offload_folder: str | Path | None
    on_missing_kernel: str
    seed: int


FORMS = ("factors", "pivoted", "neurons")
"""What a linear layer can become."""


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """What a user asks for; each field says in its help what it does. ``python -m lowrank.config`` lists
    them.

    Give it to `lowrank.compress` or `lowrank.plan` as ``config``, or its fields as keywords. `lowrank.plan`
    uses those that decide something; the others are for `lowrank.apply`.

    Raises:
        LowRankError: If an option is out of its range, or two do not go together.

    Example:
        >>> config = CompressionConfig(keep=0.5, quantize="int8")
        >>> str(config.budget), config.round_to
        ('keep=0.5', 8)
    """

    rank: int | Mapping[str, int] | None = option(
        None,
        "Inner size for every layer, or a mapping of name pattern to inner size (the last match wins). Taken "
        "exactly; a layer that it would not shrink stays dense.",
    )
    keep: float | None = option(
        None,
        "Fraction of the targeted weights' parameters that remains, in (0, 1), spread over the layers so "
        "that the predicted increase of the loss is least.",
    )
    energy: float | None = option(
        None, "Fraction of each weight's squared norm to retain under the metric, in (0, 1)."
    )
    error: float | None = option(None, "Largest relative error of each weight under the metric, in (0, 1).")
    max_bytes: int | None = option(
        None,
        "Bytes that the whole model's parameters and buffers may take; a file adds a hundred or so for each "
        "tensor.",
    )
    speedup: float | None = option(
        None,
        "Dense latency over compressed latency of the whole model, above 1, measured here and now on inputs.",
        missing=_NO_INPUTS,
    )
    metric: str = option(
        "auto",
        "What the error measures; auto takes the last that the statistics allow, and weight without any.",
        choices=("auto", *METRICS),
        error=BudgetError,
    )
    add_bias: bool = option(
        False,
        "Whether a factorized layer may get a bias where the dense one has none, which takes up the mean of "
        "the error; a bias that exists always does so under a calibrated metric.",
        check=flag,
    )
    targets: Sequence[str] | None = option(
        None,
        "Unix-style patterns of the layers to factorize; by default all but the heads.",
        check=patterns(TargetError, may_be_empty=False),
    )
    ignore: Sequence[str] | None = option(
        None, "Patterns of layers to leave alone; they win over targets.", check=patterns(TargetError)
    )
    overrule: Sequence[str] | None = option(
        None,
        "Patterns of layers that may change although reading the model's code leaves a doubt: their weight "
        "seems to be read by value, or they are of a subclass of nn.Linear. They are tried first, the former "
        "on inputs or on the first batch of the data.",
        check=patterns(TargetError),
    )
    forms: Sequence[str] | None = option(
        None,
        "What linear layers may become: factors, two thin matrices; pivoted, the same product in fewer "
        "numbers, r·(m + n − r) in place of r·(m + n), at any rank below the dense one; neurons: layers of "
        "feed-forward blocks become narrower, for keep (which counts only these blocks if that is the only "
        "form), max_bytes or speedup, as data or inputs show them. The solver "
        "chooses among those given; by default factors only. Pivoted factors stay in floating point, in "
        "float32 or float64.",
        choices=FORMS,
        check=some_of(FORMS, BudgetError),
    )
    allocation: str = option(
        "global",
        "How keep is spread: global by predicted loss, uniform as the same fraction of each layer.",
        choices=("global", "uniform"),
        error=BudgetError,
    )
    round_to: int = option(
        8,
        "Ranks that are chosen, not given, are multiples of this; under int4 all are multiples of its "
        "groups.",
        check=whole(1, error=BudgetError),
    )
    share: str | None = option(
        None,
        "Which layers may share their first factor, where that is predicted to lose less at the same size: "
        "inputs, those that read the same input (queries, keys and values; gate and up projections), which "
        "calibration sees; layers, those of one role in adjacent blocks, as a common basis.",
        choices=("inputs", "layers"),
        error=BudgetError,
    )
    share_size: int | None = option(
        None,
        "How many adjacent blocks share a basis under share=layers, at least 2; by default pairs or fours, "
        "whichever is predicted to lose less (pairs with a rank).",
        check=optional(whole(2, error=BudgetError)),
    )
    quantize: str | None = option(
        None,
        "Store factors, dense layers and embeddings as integers, whatever targets names; auto, with "
        "max_bytes, chooses for each layer whether it stays, is factorized, is quantized, or both.",
        choices=("int8", "int4", "auto"),
        check=optional(text(SchemeError)),
    )
    group_size: int | None = option(None, "Elements that share a scale under int4; 32 by default.")
    correction: bool = option(
        False,
        "Let the factors correct what a quantized weight has lost, W ≈ Q + LR, in place of replacing it; "
        "for a rank or max_bytes, with int4, or int8, which leaves little to correct.",
        check=flag,
    )
    tolerance: float = option(
        1e-3,
        "Largest relative excess over each layer's optimal error, proven or measured.",
        check=number(above=0),
    )
    sequential: bool = option(
        False,
        "Go through the model block by block on the data, and let each block make up for what was lost "
        "before it. Costs some six forward passes more, and no gradients.",
        check=flag,
        missing=_NO_DATA | _CARRIED_OUT,
    )
    offload_folder: str | Path | None = option(  # noqa: RUF009 - `option` makes a field
        None,
        "A folder on a disk for the hidden states that sequential keeps of all data; by default they stay in "
        "memory, twice tokens × hidden size.",
        check=optional(path(DataError)),
        missing=_NO_DATA | _CARRIED_OUT,
    )
    on_missing_kernel: str = option(
        "warn",
        "What to do about int4 weights that no kernel here multiplies, and that are dequantized at every "
        "call.",
        choices=ON_MISSING_KERNEL,
        error=SchemeError,
        missing=_CARRIED_OUT,
    )
    seed: int = option(
        0,
        "Seed of the randomized solver and of sampled labels; the global random state is not touched.",
        check=SEED,
        missing=_CARRIED_OUT,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self._budgets():
            object.__setattr__(self, self.budget.name, self.budget.value)
        self._check_quantization()
        self._check_sharing()
        self._check_forms()

    def _check_quantization(self) -> None:
        """Refuse combinations of quantization and budgets that have no meaning."""
        if self.quantize is None:
            if self.correction:
                raise SchemeError(
                    'correction=True corrects what quantization loses: give quantize="int4" with it.'
                )
            if self.group_size is not None:
                raise SchemeError(f'group_size={self.group_size!r} is for quantize="int4"; leave it out.')
            return
        Scheme("int4" if self.quantize == "auto" else self.quantize, self.group_size)
        asked = self._budgets()
        if "speedup" in asked:
            raise BudgetError(
                "speedup= is measured on floating-point weights. Compress to keep= or rank=, and quantize= "
                "those."
            )
        if self.quantize == "auto" and asked and "max_bytes" not in asked:
            raise BudgetError('quantize="auto" chooses how each layer is stored by max_bytes= only.')
        if self.correction and self.quantize != "auto":
            if asked and not {"rank", "max_bytes"} & asked.keys():
                raise BudgetError(
                    "correction=True adds factors to the weights: give their rank=, or max_bytes=."
                )
            if self.share is not None:
                raise BudgetError("correction=True has factors of each layer's own: leave out share=.")
        if self.sequential and (self.correction or self.quantize == "auto"):
            raise BudgetError(
                "sequential=True fits factors that replace weights, not corrections: leave one out."
            )

    def _check_forms(self) -> None:
        """Refuse forms that no layer could have."""
        if self.removes_neurons:
            self._check_neurons()
        if not self.pivots:
            return
        if self.quantize is not None:
            raise BudgetError('forms: pivoted factors are not quantized: leave out quantize=, or "pivoted".')
        if self._budgets().keys() & {"speedup"}:
            raise BudgetError(
                "forms: pivoted factors of one rank are smaller, not faster, than plain ones: leave out "
                '"pivoted" with speedup=.'
            )

    def _check_neurons(self) -> None:
        others = ("add_bias",) if self.only_neurons else ()
        budgets = ("keep",) if self.only_neurons else ("keep", "max_bytes", "speedup")
        if self.quantize is not None:
            budgets = ("keep",)
        given = [name for name in ("share", *others) if getattr(self, name)]
        given += [name for name in self._budgets() if name not in budgets]
        if given:
            also = "" if self.quantize is None else ", with quantize="
            raise BudgetError(
                f'forms: "neurons" does not go with {given[0]}={also}: it is for {"= or ".join(budgets)}=.'
            )

    @property
    def pivots(self) -> bool:
        """Whether layers may have pivoted factors."""
        return "pivoted" in (self.forms or ())

    @property
    def only_pivots(self) -> bool:
        """Whether layers that are factorized must have pivoted factors."""
        return self.pivots and "factors" not in (self.forms or ())

    def _check_sharing(self) -> None:
        if self.share_size is not None and self.share != "layers":
            raise BudgetError(
                f"share_size={self.share_size!r} says how many blocks share a basis: it goes with "
                'share="layers".'
            )

    @property
    def removes_neurons(self) -> bool:
        """Whether feed-forward blocks are to lose neurons."""
        return "neurons" in (self.forms or ())

    @property
    def only_neurons(self) -> bool:
        """Whether that is all that may change."""
        return set(self.forms or ()) == {"neurons"}

    def _budgets(self) -> dict[str, Any]:
        asked = {name: getattr(self, name) for name in Budget.NAMES}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def budget(self) -> Budget:
        """The budget.

        Raises:
            BudgetError: If none or several are given, or it is out of its range.
            RankError: If a rank is not a positive integer.
        """
        return Budget.of(**self._budgets())

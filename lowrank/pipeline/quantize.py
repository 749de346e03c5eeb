"""`quantize`: store weights as integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lowrank.adapter import adapter, inspect
from lowrank.arguments import (
    SEED,
    accepts,
    choice,
    flag,
    text,
)
from lowrank.calibration.statistics import Stats
from lowrank.config.compression import ON_MISSING_KERNEL
from lowrank.errors import SchemeError
from lowrank.inspection.targets import draft
from lowrank.linalg import Scheme
from lowrank.pipeline.stages import (
    STATS,
    carried_out,
    quantized_plan,
)

if TYPE_CHECKING:
    pass


@accepts(
    scheme=text(SchemeError),
    stats=STATS,
    on_missing_kernel=choice(ON_MISSING_KERNEL, SchemeError),
    seed=SEED,
    progress=flag,
)
def quantize(
    model: nn.Module,
    scheme: str = "int8",
    *,
    group_size: int | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    stats: Stats | None = None,
    on_missing_kernel: str = "warn",
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Store the weights of linear layers, factors and embeddings as integers, in place.

    Args:
        model: Any module, compressed or not. Call it again with other ``targets`` to mix schemes.
        scheme: ``"int8"``: one scale per row; linear layers multiply integers by integers. ``"int4"``: one
            scale per group of a row, 4.5 bits per weight; PyTorch's int4 kernels multiply the few tokens of
            a text that is being generated, and the dequantized weight multiplies many.
        group_size: Elements that share a scale under ``"int4"``; 32 by default.
        targets: Unix-style patterns of linear layers and embeddings, as `report` and ``named_modules`` call
            them; a factorized layer stands for both of its factors. By default all but the heads.
        ignore: Patterns to leave alone.
        stats: Statistics of the dense model, from `calibrate`: layers then scale and shift their inputs
            so that integers lose less.
        on_missing_kernel: What to do where int4 weights of linear layers have no kernel on the model's
            device, and are dequantized at every call: ``"warn"`` (`SlowKernelWarning`), ``"refuse"`` or
            ``"allow"``.
        seed: Of the rotation between factors; the global random state is not touched.
        progress: Show a progress bar on a terminal.

    Returns:
        The same model. Weights that are tied otherwise than a head to its embedding, used twice or read by
        value stay as they are.

    Raises:
        SchemeError: If the scheme is unknown, a weight does not divide into its groups, or int4 has no
            kernel and ``on_missing_kernel="refuse"``.
        WeightError: If a weight is not finite.
        TargetError: If a pattern matches nothing, or names what cannot be quantized.
        LowRankError: If nothing is left to quantize. The model is then as before.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
        >>> quantize(model)
        Sequential(
          (0): QuantizedEmbedding(10, 64, int8)
          (1): QuantizedLinear(in_features=64, out_features=64, int8, bias=True)
        )
    """
    seen = inspect(model)
    found, done = draft(seen), adapter().recorded(model)
    known = done.carried_out(found) if done is not None else found
    chosen = quantized_plan(seen, known, Scheme(scheme, group_size), targets, ignore, stats)
    return carried_out(seen, chosen, stats, on_missing_kernel=on_missing_kernel, seed=seed, progress=progress)

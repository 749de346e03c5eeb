"""The stages in order: draft → spectra → select → apply. Read this file to see how it all fits.

`compress` does everything in one call; `plan` only decides; `apply` only acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from tqdm import tqdm

from lowrank import surgery
from lowrank._transformers import plugin
from lowrank.errors import LowRankError, WeightError
from lowrank.linalg import Spectrum, spectrum
from lowrank.linalg.svd import check_options
from lowrank.nn import kind_of
from lowrank.obstacles import check_model
from lowrank.patterns import is_wildcard
from lowrank.planning import Budget, Plan
from lowrank.ranks import select
from lowrank.targets import draft


def compress(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    energy: float | None = None,
    error: float | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    allocation: str = "global",
    round_to: int = 8,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Replace the model's linear layers by low-rank factors, in place, under exactly one budget.

    Args:
        model: Any module with linear layers, on any device, in any floating dtype.
        rank: Inner size for every layer, or a mapping of name pattern to inner size (the last match
            wins). Taken exactly; a layer that it would not shrink stays dense.
        keep: Fraction of the targeted weights' parameters that remains, in (0, 1), spread over the
            layers so that the sum of their squared relative errors, times their parameters, is least.
        energy: Fraction of each weight's squared norm to retain, in (0, 1).
        error: Largest relative Frobenius error of each weight, in (0, 1).
        targets: Unix-style patterns of the layers to factorize; by default all but the heads.
        ignore: Patterns of layers to leave alone.
        allocation: ``"global"``, or ``"uniform"`` to keep the same fraction of each layer.
        round_to: Ranks that are chosen, not given, are multiples of this.
        tolerance: Largest relative excess over each layer's optimal error, proven or measured.
        seed: Seed of the randomized solver; the global random state is not touched.
        progress: Show progress bars on a terminal.

    Returns:
        The same model, with `LowRankLinear` layers. `lowrank.report` tells what it cost and won.

    Raises:
        LowRankError: If anything is wrong with the request or the model; the model is then as before.

    Source: Eckart & Young 1936; the allocation as Shoham & Gersho 1988.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        >>> compress(model, rank=16)[0]
        LowRankLinear(
          in_features=256, out_features=256, rank=16, bias=True
          (down): Linear(in_features=256, out_features=16, bias=False)
          (up): Linear(in_features=16, out_features=256, bias=True)
        )
    """
    budget = Budget.of(rank=rank, keep=keep, energy=energy, error=error)
    decided = _decide(
        model,
        budget,
        targets=targets,
        ignore=ignore,
        allocation=allocation,
        round_to=round_to,
        tolerance=tolerance,
        predict=budget.kind != "rank",  # a given rank decides nothing by its error: spare the spectra
        progress=progress,
    )
    return apply(model, decided, seed=seed, progress=progress)


def plan(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    energy: float | None = None,
    error: float | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    allocation: str = "global",
    round_to: int = 8,
    tolerance: float = 1e-3,
    progress: bool = False,
) -> Plan:
    """Decide each layer's rank and predict its error, without changing the model.

    The arguments are those of `compress`.

    Returns:
        A `Plan`: print it, save it, edit it (`Plan.with_rank`), compare it (`Plan.diff`), `apply` it.

    Raises:
        LowRankError: If anything is wrong with the request or the model.
    """
    return _decide(
        model,
        Budget.of(rank=rank, keep=keep, energy=energy, error=error),
        targets=targets,
        ignore=ignore,
        allocation=allocation,
        round_to=round_to,
        tolerance=tolerance,
        predict=True,
        progress=progress,
    )


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Replace every layer that ``plan`` gives a rank by its factors, in place.

    Args:
        model: The model that the plan was made for. Layers keep their device, dtype, training mode,
            ``requires_grad`` and hooks; biases are the same parameters as before.
        plan: Ranks by layer, from `plan`, perhaps edited. Layers that are factorized already must
            have the rank that it names.
        seed: Seed of the randomized solver; results are reproducible for a seed.
        progress: Show a progress bar on a terminal.

    Returns:
        The same model. A transformers model's config now holds the plan, for ``save_pretrained``.

    Raises:
        PlanError: If a layer is missing, has another shape, must stay dense, or would not shrink.
        WeightError: If a weight is not finite or has no data.
            Both are raised before anything has changed. An interrupt leaves the layers done so far.
    """
    hf = plugin()
    if hf is not None:
        hf.check_unquantized(check_model(model))
    try:
        surgery.apply(model, plan, seed=seed, progress=progress)
    except LowRankError:
        raise  # nothing has changed
    except BaseException:  # an interrupt: what is done is done, and can be saved
        if hf is not None:
            hf.record(model, plan)
        raise
    if hf is not None:
        hf.record(model, plan)
    return model


def decompress(model: nn.Module) -> nn.Module:
    """Multiply every factorized layer back into a dense one of its original type, in place.

    The outputs stay those of the compressed model, to rounding; the lost accuracy does not return.

    Returns:
        The same model.

    Raises:
        LowRankError: If the model is itself a factorized layer, or no module.
    """
    surgery.decompress(model)
    hf = plugin()
    if hf is not None:
        hf.record(model)
    return model


def spectra(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    progress: bool = False,
) -> dict[str, Spectrum]:
    """Decompose every targeted weight once: its error at every rank, by layer name.

    The arguments are those of `compress`.

    Raises:
        LowRankError: If a pattern matches nothing, or a weight cannot be factorized.
    """
    return _spectra(model, _draft(model, targets, ignore), progress)


def _decide(
    model: nn.Module,
    budget: Budget,
    *,
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
    allocation: str,
    round_to: int,
    tolerance: float,
    predict: bool,
    progress: bool,
) -> Plan:
    check_options(tolerance, seed=0)
    drafted = _draft(model, targets, ignore)
    measured = _spectra(model, drafted, progress) if predict else {}
    return select(
        drafted,
        budget,
        measured,
        allocation=allocation,
        round_to=round_to,
        named=[pattern for pattern in targets or () if not is_wildcard(pattern)],
        tolerance=tolerance,
    )


def _draft(model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str] | None) -> Plan:
    hf = plugin()
    heads = hf.head_layers(check_model(model)) if hf is not None else None
    return draft(check_model(model), targets, ignore, heads)


def _spectra(model: nn.Module, drafted: Plan, progress: bool) -> dict[str, Spectrum]:
    measured = {}
    bar = tqdm(drafted.targeted, desc="spectra", unit="layer", disable=None if progress else True)
    for layer in bar:
        module = model.get_submodule(layer.name)
        kind = kind_of(module)
        assert kind is not None  # drafted as a target
        try:
            measured[layer.name] = spectrum(kind.weight(module))
        except WeightError as error:
            raise WeightError(f"{layer.name}: {error}") from error
    return measured

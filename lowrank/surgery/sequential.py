r"""Anchored sequential calibration: the blocks make up for what the layers before them have lost.

Factors chosen one by one assume that a layer reads what the dense one reads. It does not: what comes
before it is compressed, too, and errors pile up in the residual stream. So go through the stack of
blocks with two streams of hidden states, of the dense model and of the compressed one. A layer whose
output y the model adds to another tensor r, which is how blocks write into the stream, gets its second
factor and bias fitted anew to the sum:

    min  Σ_t w_t ‖ (y + r)_t − (L z + b + r̂)_t ‖²  +  λ ‖ (L − L₀) D^½ ‖²,    z = R x̂,  D = diag(E[zzᵀ])

where y + r is of the dense stream, x̂ and r̂ are what there is in the compressed model, and L₀ is the
factor before. So it makes up for the whole error of the stream, as far as its input can tell. These sums
are normalized before anything reads them, hence a token weighs ``w = 1/‖y + r‖²``. Other layers stay as
they are: fitting them to compressed inputs shrinks what they say towards its mean, and made language
models worse. In a block that adds nothing, all layers are fitted, to their own dense outputs. A layer that
reads fewer neurons than it did has no first factor: its whole weight is fitted, with ``z = x̂``.

λ is chosen by the error on held-out batches, L₀ among the candidates. Memory: two hidden states of all
batches, and what else their blocks are called with (masks); one dense block; the moments of one layer's
``z``. The hidden states may lie on a disk.

Sources: the regression on the compressed model's inputs as in SVD-LLM (Wang et al. 2024,
arXiv:2403.07378); the dense stream as its target as in GPTAQ (Li et al. 2025, arXiv:2504.02692).
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.data import PARTS, Batch
from lowrank.calibration.statistics import Stats
from lowrank.errors import DataError, LowRankError, PlanError
from lowrank.inspection.blocks import find_blocks
from lowrank.inspection.contexts import eval_mode
from lowrank.inspection.inspection import Inspection
from lowrank.linalg.ridge import Regression
from lowrank.nn import LowRankEmbedding, LowRankLinear, features_before
from lowrank.plans.plan import Plan
from lowrank.surgery.factorization import weight_of
from lowrank.surgery.hidden_states import CachedHiddenStates
from lowrank.surgery.replacement import register_overruled, replace_layers
from lowrank.surgery.residual_adds import ResidualAddRecorder
from lowrank.surgery.validation import check_request

RIDGES = (1e-3, 1e-2, 1e-1, math.inf)
"""Candidates for λ; at infinity the factor stays as it was."""


class Fitted(NamedTuple):
    """What going through the blocks has done.

    Attributes:
        layers: Those that were fitted anew.
        kept: By name of the layers that read fewer inputs, which of the old ones these are.
    """

    layers: set[str]
    kept: dict[str, Tensor]


def apply_sequentially(
    seen: Inspection,
    plan: Plan,
    stats: Stats | None,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    offload_folder: Path | None = None,
    progress: bool = False,
) -> Fitted:
    """Carry out ``plan`` block by block; see `lowrank.apply` for the arguments and errors."""
    model = seen.model
    check_request(seen, plan, stats, seed)
    blocks = find_blocks(model)
    seen.release()
    _check_can_go_through(model, plan, blocks)
    changed = [layer for layer in plan if layer.rank is not None or layer.is_narrower]
    inside = {x.name: name for x in changed for name in blocks if x.name.startswith(f"{name}.")}
    _check_together(plan, inside)
    fitted = Fitted(set(), {})
    with contextlib.ExitStack() as stack:
        folder = None if offload_folder is None else stack.enter_context(_folder_in(offload_folder))
        cached = [CachedHiddenStates(batch, folder) for batch in batches]
        if len(cached) < PARTS:
            raise DataError(
                f"sequential=True needs {PARTS} batches or more, one of them to see what it gains; there "
                f"are {len(cached)}. Give more data, or the same in smaller batches."
            )
        with torch.no_grad(), eval_mode(model):
            for number, each in enumerate(cached):
                each.enter(model, list(blocks.values()), to_the_end=number == 0)
            _check_sums(blocks, inside, cached[0])
        register_overruled(model, plan)
        outside = [layer.name for layer in changed if layer.name not in inside]
        if outside:
            fitted.kept.update(_replace(model, _part(plan, outside), stats, seed))
            with torch.no_grad(), eval_mode(model):
                for each in cached:
                    each.enter_compressed(model, list(blocks.values()))
        bar = tqdm(blocks.items(), desc="fitting", unit="block", disable=None if progress else True)
        for number, (name, block) in enumerate(bar):
            dense = copy.deepcopy(block)
            names = [layer for layer, home in inside.items() if home == name]
            fitted.kept.update(_replace(model, _part(plan, names), stats, seed))
            fits = [layer.removeprefix(f"{name}.") for layer in names if plan[layer].kept_outputs is None]
            with torch.no_grad(), eval_mode(block), eval_mode(dense):
                done = _refit(dense, block, fits, cached, number)
                fitted.layers.update(f"{name}.{layer}" for layer in done)
                for each in cached:
                    each.advance(dense, block, number)
    return fitted


def _check_can_go_through(model: nn.Module, plan: Plan, blocks: Mapping[str, nn.Module]) -> None:
    """Refuse models and plans that cannot be gone through block by block."""
    if not blocks:
        raise LowRankError(
            f"sequential=True goes through a stack of repeated blocks, and {type(model).__name__} has none. "
            "Leave it out."
        )
    if any(isinstance(module, LowRankLinear) or features_before(module) for module in model.modules()):
        raise LowRankError(
            "sequential=True needs the dense model to compare with; this one has factorized or narrower "
            "layers. Start from the dense checkpoint."
        )
    if any(layer.correction for layer in plan.factorized):
        raise LowRankError(
            "sequential=True fits factors anew that replace weights, and these correct quantized ones. "
            "Leave it out."
        )
    if any(layer.name in plan.equal for layer in plan.factorized):
        raise LowRankError(
            "sequential=True goes through blocks one by one, and by the plan some layers use the factors of "
            "others. Leave it out, or plan without those."
        )
    if any(layer.name in blocks for layer in plan.factorized):
        raise LowRankError(
            "sequential=True needs blocks of several layers, and these are linear layers themselves. "
            "Leave it out."
        )


@contextlib.contextmanager
def _folder_in(offload_folder: Path) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(dir=offload_folder)
    except OSError as error:
        raise LowRankError(
            f"offload_folder={str(offload_folder)!r}: hidden states cannot be kept there: {error}."
        ) from error
    with folder as name:
        yield Path(name)


def _replace(model: nn.Module, plan: Plan, stats: Stats | None, seed: int) -> dict[str, Tensor]:
    """Replace the layers of a part of the plan, which has been checked as a whole."""
    done = LowRankLinear, LowRankEmbedding
    todo = [x for x in plan.factorized if not isinstance(model.get_submodule(x.name), done)]
    return replace_layers(model, plan, todo, stats, seed=seed)


def _part(plan: Plan, names: Sequence[str]) -> Plan:
    layers = tuple(layer for layer in plan if layer.name in names or layer.tied_to in names)
    return replace(plan, layers=layers, quantized=())


def _check_together(plan: Plan, inside: Mapping[str, str]) -> None:
    """Refuse layers of several blocks that change together: blocks are gone through one by one."""
    for layer in plan:
        if layer.kept_outputs is not None and inside.get(layer.name) != inside.get(layer.feeds or ""):
            raise PlanError(
                f"{layer.name}: loses neurons that {layer.feeds} reads, which is in another block. Plan "
                "without neurons among forms, or leave out sequential."
            )
    for name, layers in plan.shared.items():
        for layer in layers:
            if inside.get(layer.name) != inside.get(name):
                raise PlanError(
                    f"{layer.name}: uses the down of {name}, which is in another block. Plan without share, "
                    "or leave out sequential."
                )


def _check_sums(
    blocks: Mapping[str, nn.Module], inside: Mapping[str, str], first: CachedHiddenStates
) -> None:
    """Refuse a model that adds something, but never a layer's output as it is."""
    hidden, adds = first.dense.clone(), False
    for number, (name, block) in enumerate(blocks.items()):
        names = [x.removeprefix(f"{name}.") for x, home in inside.items() if home == name]
        recorder = ResidualAddRecorder(block, names, to_the_end=True)
        recorder.run(lambda block=block, number=number: first.advance(block, block, number))  # type: ignore[misc]
        if recorder.addends:
            break
        adds |= recorder.adds
    else:
        if adds:
            raise LowRankError(
                "sequential=True sees no layer whose output is added to the hidden states as it is: this "
                "model scales or normalizes it first. Leave it out."
            )
    first.start(hidden)


def _refit(
    dense: nn.Module,
    small: nn.Module,
    names: Sequence[str],
    cached: Sequence[CachedHiddenStates],
    number: int,
) -> list[str]:
    """Fit the second factors of a block's layers anew, in the order in which they run; return which."""
    stages, sums = _stages(small, names, cached[0], number)
    done = []
    for stage in stages:
        fits: dict[str, _Fit] = {}
        for each in cached:
            there, here = (ResidualAddRecorder(block, stage, sums & set(stage)) for block in (dense, small))
            there.run(lambda each=each: each.call_dense(dense, number))  # type: ignore[misc]
            here.run(lambda each=each: each.call_small(small, number))  # type: ignore[misc]
            for name in stage:
                if _alike(name, there, here):
                    fit = fits.setdefault(name, _Fit(small.get_submodule(name)))
                    fit.add(name, there, here, each.batch)
        done += [name for name, fit in fits.items() if fit.finish()]
    return done


def _alike(name: str, dense: ResidualAddRecorder, small: ResidualAddRecorder) -> bool:
    """Tell whether both streams have the same rows at a layer; an expert may get other tokens in each."""
    if name not in dense.outputs or name not in small.outputs:
        return False
    same = dense.outputs[name].shape == small.outputs[name].shape
    return same and getattr(dense.addends.get(name), "shape", None) == getattr(
        small.addends.get(name), "shape", None
    )


def _stages(
    small: nn.Module, names: Sequence[str], first: CachedHiddenStates, number: int
) -> tuple[list[list[str]], set[str]]:
    """Return the layers to fit, those that read the same input together, in the order in which they run.

    That is the layers whose outputs are added to something, the second thing returned; in a block that
    adds nothing, all. A layer that runs several times has no input of its own, and stays as it is.
    """
    recorder = ResidualAddRecorder(small, names, to_the_end=True)
    recorder.run(lambda: first.call_small(small, number))
    once = {name: read for name, read in recorder.inputs.items() if name not in recorder.repeated}
    sums = once.keys() & recorder.addends.keys()
    stages: dict[int, list[str]] = {}
    for name, read in once.items():
        if name in sums or not recorder.adds:
            stages.setdefault(id(read), []).append(name)
    return list(stages.values()), sums


class _Fit:
    """The regression of one layer's second factor and bias, or of the weight of a narrower layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._second: nn.Module = layer.up if isinstance(layer, LowRankLinear) else layer
        self._weight = weight_of(self._second).detach()
        self._bias: nn.Parameter | None = self._second.bias  # type: ignore[assignment]
        make = self._weight.shape[1], self._weight.shape[0], self._weight.device
        self._fitted, self._held = Regression.empty(*make), Regression.empty(*make)
        self._centre: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, dense: ResidualAddRecorder, small: ResidualAddRecorder, batch: Batch) -> None:
        """Add the tokens of one batch."""
        read = small.inputs[name]
        if isinstance(self._layer, LowRankLinear):
            read = nn.functional.linear(read, self._layer.down.weight)
        z = batch.real(read).float()
        if not len(z):
            return  # an expert that this batch has no token for
        y = batch.real(dense.outputs[name]).float()
        weight = z.new_ones(len(z), 1)
        if name in dense.addends and name in small.addends:
            there, here = (batch.real(recorder.addends[name]).float() for recorder in (dense, small))
            total = y + there
            weight = 1 / total.square().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            y = total - here
        if self._centre is None:  # near the mean, so that little cancels; nothing where there is no bias
            some = (z.mean(0), y.mean(0)) if self._bias is not None else (z[0] * 0, y[0] * 0)
            self._centre = some
        sums = self._held if batch.held_out else self._fitted
        sums.add(z - self._centre[0], y - self._centre[1], weight)

    def finish(self) -> bool:
        """Set the factor and the bias to the candidate that fares best on held-out batches.

        Returns:
            Whether that is another factor than before.
        """
        if self._centre is None or not self._fitted.weight > 0:
            return False
        before, intercept = self._weight.double(), self._bias is not None
        tried = {ridge: self._fitted.solve(ridge, before, intercept) for ridge in RIDGES}
        chosen = min(tried, key=lambda ridge: self._held.error(*tried[ridge]))
        left, bias = (self._fitted + self._held).solve(chosen, before, intercept)
        if not bool(left.isfinite().all() and bias.isfinite().all()):
            return False  # the compressed model overflows on these data
        self._weight.copy_(left)
        if self._bias is not None:
            z, y = (mean.double() for mean in self._centre)
            self._bias.copy_(bias + y - left @ z)
        if chosen < math.inf and isinstance(self._layer, LowRankLinear):
            self._layer.relative_error = None  # of the factor before; this one has another aim
        return chosen < math.inf

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
models worse. In a block that adds nothing, all layers are fitted, to their own dense outputs.

λ is chosen by the error on held-out batches, L₀ among the candidates. Memory: two hidden states of all
batches, one dense block, and moments of one layer's ``z``; the hidden states may lie on a disk.

Sources: the regression on the compressed model's inputs as in SVD-LLM (Wang et al. 2024,
arXiv:2403.07378); the dense stream as its target as in GPTAQ (Li et al. 2025, arXiv:2504.02692).
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from lowrank.batches import Batch
from lowrank.blocks import find_blocks, hidden_state
from lowrank.errors import DataError, LowRankError
from lowrank.modes import eval_mode
from lowrank.nn import LowRankLinear
from lowrank.planning import Plan
from lowrank.statistics import Stats
from lowrank.surgery import apply, check_request

RIDGES = (1e-3, 1e-2, 1e-1, math.inf)
"""Candidates for λ; at infinity the factor stays as it was."""

HELD_OUT = 4
"""Every how manieth batch chooses among them."""


class _Reached(BaseException):
    """Ends a forward pass early; no model catches what is not an `Exception`."""


def apply_anchored(
    model: nn.Module,
    plan: Plan,
    stats: Stats | None,
    stream: Iterable[Batch],
    *,
    seed: int = 0,
    spill: Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """Carry out ``plan`` block by block; see `lowrank.apply` for the arguments and errors."""
    check_request(model, plan, stats, seed)
    blocks = find_blocks(model)
    if not blocks:
        raise LowRankError(
            f"sequential=True goes through a stack of repeated blocks, and {type(model).__name__} has none. "
            "Leave it out."
        )
    with contextlib.ExitStack() as stack:
        there = None if spill is None else stack.enter_context(tempfile.TemporaryDirectory(dir=spill))
        passes = [_Pass(batch, Path(there) if there else None) for batch in stream]
        _go_through(model, plan, stats, blocks, passes, seed, progress)
    return model


def _go_through(
    model: nn.Module,
    plan: Plan,
    stats: Stats | None,
    blocks: Mapping[str, nn.Module],
    passes: Sequence[_Pass],
    seed: int,
    progress: bool,
) -> None:
    inside = {x.name: name for x in plan for name in blocks if x.name.startswith(f"{name}.")}
    with torch.no_grad(), eval_mode(model):
        for each in passes:
            each.enter(model, list(blocks.values()))
    apply(model, _part(plan, [x.name for x in plan if x.name not in inside]), stats, seed=seed)
    with torch.no_grad(), eval_mode(model):
        for each in passes:
            each.enter_compressed(model, next(iter(blocks.values())))
    bar = tqdm(blocks.items(), desc="anchoring", unit="block", disable=None if progress else True)
    for number, (name, block) in enumerate(bar):
        dense = copy.deepcopy(block)
        names = [layer for layer, home in inside.items() if home == name]
        apply(model, _part(plan, names), stats, seed=seed)
        with torch.no_grad(), eval_mode(block), eval_mode(dense):
            _refit(dense, block, [layer.removeprefix(f"{name}.") for layer in names], passes, number)
            for each in passes:
                each.advance(dense, block, number)


def _part(plan: Plan, names: Sequence[str]) -> Plan:
    return replace(plan, layers=tuple(plan[name] for name in names))


class _Pass:
    """One batch on its way through the blocks, in the dense model and in the compressed one."""

    def __init__(self, batch: Batch, spill: Path | None) -> None:
        self.batch = batch
        self._spill = spill
        self._others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # per block, beside the hidden state

    def enter(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Run the dense model, and keep what each block is called with."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))
            if block is blocks[-1]:
                raise _Reached

        self._run(model, blocks, before)
        if len(calls) != len(blocks):
            raise LowRankError(
                f"sequential=True needs blocks that are called once each, in order; {len(blocks)} blocks "
                f"were called {len(calls)} times. Leave it out."
            )
        hidden = _hidden_of(*calls[0])
        if not bool(hidden.isfinite().all()):
            raise DataError(f"Batch {self.batch.index}: what enters the first block is not finite.")
        self.dense = self._kept(hidden, "dense")
        self._others = [(_plain(args[1:]), _plain(kwargs)) for args, kwargs in calls]

    def enter_compressed(self, model: nn.Module, first: nn.Module) -> None:
        """Run what comes before the blocks, which may be compressed by now."""
        found: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_hidden_of(args, kwargs))
            raise _Reached

        self._run(model, [first], before)
        self.small = self._kept(found[0], "small")

    def _run(self, model: nn.Module, blocks: Iterable[nn.Module], before: Callable[..., None]) -> None:
        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
        try:
            self.batch.call(model)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def call(self, block: nn.Module, number: int, hidden: Tensor) -> Any:
        """Call a block, or its dense copy, as the model called it."""
        args, kwargs = self._others[number]
        if "hidden_states" in kwargs:
            return block(*args, **{**kwargs, "hidden_states": hidden})
        return block(hidden, *args, **kwargs)

    def advance(self, dense: nn.Module, small: nn.Module, number: int) -> None:
        """Go through one block."""
        self.dense = self._kept(_output_of(self.call(dense, number, self.dense)), "dense")
        self.small = self._kept(_output_of(self.call(small, number, self.small)), "small")

    def _kept(self, hidden: Tensor, stream: str) -> Tensor:
        """Return ``hidden``, on the disk if that is wanted; what was there before is overwritten."""
        if self._spill is None:
            return hidden
        file = self._spill / f"{stream}-{self.batch.index}"
        there = torch.from_file(str(file), shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return there.view(hidden.shape).copy_(hidden)


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise LowRankError(
            "sequential=True needs blocks whose first argument is a tensor of hidden states; "
            f"this one is {type(hidden).__name__}. Leave it out."
        )
    return hidden


def _output_of(output: Any) -> Tensor:
    hidden = hidden_state(output)
    if hidden is None:
        raise LowRankError(f"A block returned {type(output).__name__}, no hidden states.")
    return hidden


def _plain(value: Any) -> Any:
    """Leave out caches of keys and values: they would remember one call in the next."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_plain(item) for item in value)
    return None if hasattr(value, "get_seq_length") else value


class _Listener(TorchFunctionMode):
    """Notes, while a block runs, what its layers read and return, and what their outputs are added to.

    Args:
        block: The block.
        names: Layers to listen to.
        sums: Those of them whose outputs will be added to something.
        to_the_end: Whether to go on when all of that is known.
    """

    def __init__(
        self, block: nn.Module, names: Sequence[str], sums: Collection[str] = (), to_the_end: bool = False
    ) -> None:
        super().__init__()
        self._block, self._names, self._sums, self._to_the_end = block, names, sums, to_the_end
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.addends: dict[str, Tensor] = {}
        self.repeated: set[str] = set()

    def run(self, call: Callable[[], Any]) -> None:
        """Run the block, or as much of it as is needed."""
        handles = []
        try:
            for name in self._names:
                layer = self._block.get_submodule(name)
                handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))
            with self:
                call()
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if name in self.inputs:
                self.repeated.add(name)
            self.inputs[name], self.outputs[name] = args[0] if args else kwargs["input"], output
            self._end_if_complete()

        return hook

    def _end_if_complete(self) -> None:
        complete = self.outputs.keys() >= set(self._names) and self.addends.keys() >= set(self._sums)
        if complete and not self._to_the_end:
            raise _Reached

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            self._note(*args)
            self._note(*args[::-1])
        return func(*args, **(kwargs or {}))

    def _note(self, first: Any, other: Any) -> None:
        """Keep ``other`` if ``first`` is what a layer returned, perhaps after a dropout or a reshape."""
        if not (isinstance(first, Tensor) and isinstance(other, Tensor) and first.shape == other.shape):
            return
        for name, output in self.outputs.items():
            if output.data_ptr() == first.data_ptr() and output.numel() == first.numel():
                self.addends.setdefault(name, other.clone())  # which may be changed in place
                self._end_if_complete()


_ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})


def _refit(
    dense: nn.Module, small: nn.Module, names: Sequence[str], passes: Sequence[_Pass], number: int
) -> None:
    """Fit the second factors of a block's layers anew, in the order in which they run."""
    stages, sums = _stages(small, names, passes[0], number)
    for stage in stages:
        fits: dict[str, _Fit] = {}
        for each in passes:
            there, here = (_Listener(block, stage, sums & set(stage)) for block in (dense, small))
            there.run(lambda each=each: each.call(dense, number, each.dense))  # type: ignore[misc]
            here.run(lambda each=each: each.call(small, number, each.small))  # type: ignore[misc]
            for name in stage:
                if name in there.outputs and name in here.inputs:
                    fit = fits.setdefault(name, _Fit(small.get_submodule(name)))  # type: ignore[arg-type]
                    fit.add(name, there, here, each.batch)
        for fit in fits.values():
            fit.carry_out()


def _stages(
    small: nn.Module, names: Sequence[str], first: _Pass, number: int
) -> tuple[list[list[str]], set[str]]:
    """Return the layers to fit, those that read the same input together, in the order in which they run.

    That is the layers whose outputs are added to something, the second thing returned; where there are
    none, all. A layer that runs several times has no input of its own, and stays as it is.
    """
    listener = _Listener(small, names, to_the_end=True)
    listener.run(lambda: first.call(small, number, first.small))
    once = {name: read for name, read in listener.inputs.items() if name not in listener.repeated}
    factorized = {name for name in once if isinstance(small.get_submodule(name), LowRankLinear)}
    sums = factorized & listener.addends.keys()
    stages: dict[int, list[str]] = {}
    for name, read in once.items():
        if name in (sums or factorized):
            stages.setdefault(id(read), []).append(name)
    return list(stages.values()), sums


@dataclass
class _Moments:
    """Weighted sums over tokens of ``z (rank,)`` and ``y (out,)``, in float64."""

    weight: float
    z: Tensor
    y: Tensor
    zz: Tensor
    yz: Tensor
    yy: float

    @classmethod
    def zeros(cls, rank: int, out: int, device: torch.device) -> _Moments:
        make = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(0.0, make(rank), make(out), make(rank, rank), make(out, rank), 0.0)

    def add(self, z: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add tokens ``z (tokens, rank)``, ``y (tokens, out)`` with ``weight (tokens, 1)``."""
        heavy_z, heavy_y = z * weight, y * weight
        self.weight += float(weight.sum(dtype=torch.float64))
        self.z += heavy_z.sum(0, dtype=torch.float64)
        self.y += heavy_y.sum(0, dtype=torch.float64)
        self.zz += heavy_z.T @ z
        self.yz += heavy_y.T @ z
        self.yy += float((heavy_y * y).sum(dtype=torch.float64))

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            *(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def error(self, left: Tensor, bias: Tensor) -> float:
        """Return ``Σ w ‖y − L z − b‖²``."""
        explained = 2 * (left * self.yz).sum() - ((left @ self.zz) * left).sum()
        constant = 2 * bias @ (self.y - left @ self.z) - self.weight * bias @ bias
        return self.yy - float(explained) - float(constant)


class _Fit:
    """The regression of one layer's second factor and bias."""

    def __init__(self, layer: LowRankLinear) -> None:
        self._layer = layer
        make = layer.rank, layer.out_features, layer.up.weight.device
        self._fitted, self._held = _Moments.zeros(*make), _Moments.zeros(*make)
        self._centre: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, dense: _Listener, small: _Listener, batch: Batch) -> None:
        """Add the tokens of one batch."""
        z = batch.real(nn.functional.linear(small.inputs[name], self._layer.down.weight)).float()
        y = batch.real(dense.outputs[name]).float()
        weight = z.new_ones(len(z), 1)
        if name in dense.addends and name in small.addends:
            there, here = (batch.real(listener.addends[name]).float() for listener in (dense, small))
            total = y + there
            weight = 1 / total.square().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            y = total - here
        if self._centre is None:  # near the mean, so that little cancels; nothing where there is no bias
            some = (z.mean(0), y.mean(0)) if self._layer.bias is not None else (z[0] * 0, y[0] * 0)
            self._centre = some
        sums = self._held if batch.index % HELD_OUT == HELD_OUT - 1 else self._fitted
        sums.add(z - self._centre[0], y - self._centre[1], weight)

    def carry_out(self) -> None:
        """Set the factor and the bias to the candidate that fares best on held-out batches."""
        if self._centre is None or not self._fitted.weight > 0:
            return
        chosen = RIDGES[1]
        if self._held.weight > 0:
            chosen = min(RIDGES, key=lambda ridge: self._held.error(*self._solve(self._fitted, ridge)))
        left, bias = self._solve(self._fitted + self._held, chosen)
        up = self._layer.up
        if not bool(left.isfinite().all() and bias.isfinite().all()):
            return  # the compressed model overflows on these data
        up.weight.copy_(left)
        if up.bias is not None:
            z, y = (mean.double() for mean in self._centre)
            up.bias.copy_(bias + y - left @ z)

    def _solve(self, sums: _Moments, ridge: float) -> tuple[Tensor, Tensor]:
        """Return ``L`` and, about the centre, ``b`` for one ``λ``."""
        before = self._layer.up.weight.double()
        zz, yz = sums.zz / sums.weight, sums.yz / sums.weight
        z, y = sums.z / sums.weight, sums.y / sums.weight
        if self._layer.bias is not None:
            zz, yz = zz - torch.outer(z, z), yz - torch.outer(y, z)
        left = before
        if ridge < math.inf:
            added = ridge * zz.diagonal().clamp(min=0) + 1e-12 * zz.diagonal().abs().mean()
            damped = zz + torch.diag(added)
            root, failed = torch.linalg.cholesky_ex(damped)
            if not failed:  # else there is nothing to be read from z
                left = before + torch.cholesky_solve((yz - before @ zz).T, root).T
        return left, (y - left @ z if self._layer.bias is not None else torch.zeros_like(y))

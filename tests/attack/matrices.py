"""Matrices of extreme sizes, ranks and shapes against slow oracles in float64.

The oracle of an error is the definition: the difference, multiplied by the inputs and the outputs' gradients
that the metric was made of. What may differ is what the dtype rounds: each element of the factors by half a
unit, and squares by half the digits of float64.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Broken
from torch import Tensor, nn

from lowrank import SlowKernelWarning, apply, calibrate, plan
from lowrank.errors import LowRankError, WeightError
from lowrank.linalg import (
    Diagonal,
    Gram,
    Identity,
    Metric,
    PulledBack,
    Scheme,
    dequantize_weight,
    error_curve,
    quantize_with_correction,
    shared_basis,
    truncated_svd,
)
from lowrank.nn import QuantizedLinear, integer_matmul

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
RESOLVED = math.sqrt(torch.finfo(torch.float64).eps)
"""Relative size of what is lost where float64 holds squares."""


class Draw:
    """Random choices and tensors, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, *choices: Any) -> Any:
        """Return one of the choices."""
        return self.choose.choice(choices)

    def size(self) -> int:
        """Return a number from 1 to 64, small ones often."""
        return self.choose.randint(1, self.of(3, 16, 64))

    def gaussian(self, *shape: int) -> Tensor:
        """Return normal numbers in float64."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def scales(self, *shape: int, digits: float = 30) -> Tensor:
        """Return positive numbers, evenly over their logarithms, from ``10⁻ᵈ`` to ``10ᵈ``."""
        return 10 ** (digits * (2 * torch.rand(*shape, generator=self.generator, dtype=torch.float64) - 1))

    def weight(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return a matrix of some kind and scale."""
        rank = self.of(0, 1, max(1, min(rows, columns) // 3))
        index = torch.arange(1.0, rows + 1, dtype=torch.float64)[:, None]
        made = self.of(
            self.gaussian(rows, columns),
            self.gaussian(rows, rank) @ self.gaussian(rank, columns),
            1 / (index + torch.arange(columns)),  # Hilbert's
            torch.linalg.qr(self.gaussian(max(rows, columns), min(rows, columns))).Q.reshape(rows, columns),
            torch.eye(rows, columns, dtype=torch.float64),
        )
        digits = 4 if dtype == torch.float16 else 30
        sizes = self.of((1, 1), (1, 1), (rows, 1), (1, columns))
        scale = self.of(1.0, self.scales(*sizes, digits=digits))
        most = torch.finfo(dtype).max
        return (made * scale).clamp(-most, most).to(dtype)

    def rows(self, features: int) -> Tensor:
        """Return what a metric is made of, ``(tokens, features)``: few or many, uneven, constant, or dead."""
        made = self.gaussian(self.of(1, max(1, features // 2), 2 * features + 3), features)
        alive = (torch.rand(features, generator=self.generator) < 0.5).double()
        scale = self.of(1.0, alive, self.scales(1, 1, digits=20), self.scales(1, features, digits=8))
        return made * scale + self.of(0.0, 0.0, 1e3)


class Problem(NamedTuple):
    """A weight and a metric, with what the metric was made of."""

    weight: Tensor
    inputs: Tensor  # (in, tokens)
    outputs: Tensor  # (out, tokens)
    metric: Metric

    def seen(self, matrix: Tensor) -> Tensor:
        """Return what ``matrix`` does to the inputs, as the outputs' gradients feel it."""
        return self.outputs.T @ matrix @ self.inputs

    def error(self, product: Tensor) -> float:
        """Return the relative error of an approximation, in float64."""
        weight = self.weight.double()
        whole = self.seen(weight).norm()
        return float(self.seen(weight - product).norm() / whole) if whole > 0 else 0.0

    def least(self, rank: int) -> float:
        """Return the relative error of the best approximation."""
        values = torch.linalg.svdvals(self.seen(self.weight.double()))
        return float(values[rank:].norm() / values.norm()) if values[0] > 0 else 0.0

    def allowed(self, *factors: Tensor) -> float:
        """Return what rounding may add to an error, for ``left``, ``right`` and dense parts.

        Rounding does not know the metric: where large elements cancel in it, their rounding does not.
        """
        whole = self.seen(self.weight.double()).norm()
        if not whole > 0:
            return 0.0
        finest = torch.finfo(self.weight.dtype)
        left, right = factors[0].double().abs(), factors[1].double().abs()
        lost = finest.smallest_normal * finest.eps * (left.sum(1, keepdim=True) + right.sum(0))
        lost = lost + 3 * finest.eps * (left @ right + sum(part.double().abs() for part in factors[2:]))
        elements = self.weight.double().abs() + left @ right
        squares = RESOLVED * math.sqrt(sum(self.weight.shape)) * elements
        return float((self.outputs.T.abs() @ (lost + 10 * squares) @ self.inputs.abs()).norm() / whole)


def problem(draw: Draw, rows: int, columns: int, dtype: torch.dtype, pulled: bool = True) -> Problem:
    """Return a weight under a metric that was drawn."""
    weight = draw.weight(rows, columns, dtype)
    kind = draw.of("weight", "diagonal", "inputs", "loss")
    inputs, outputs = torch.eye(columns, dtype=torch.float64), torch.eye(rows, dtype=torch.float64)
    if kind == "diagonal":
        inputs = torch.diag(draw.rows(columns)[0])
        return Problem(weight, inputs, outputs, Metric(Diagonal(inputs.diagonal().square())))
    if kind == "weight":
        return Problem(weight, inputs, outputs, Metric())
    inputs = draw.rows(columns).T
    side: Any = Identity()
    if kind == "loss":
        outputs = draw.rows(rows).T
        side = Gram(outputs @ outputs.T)
        if pulled and rows > columns:
            side = PulledBack(side.pull_back(weight.double()))
    return Problem(weight, inputs, outputs, Metric(Gram(inputs @ inputs.T), side))


def factored(draw: Draw) -> str:
    """Factorize one matrix: the error is the least, and it is the stated and the predicted one."""
    given = problem(draw, draw.size(), draw.size(), draw.of(*DTYPES))
    rank = draw.choose.randint(1, min(given.weight.shape))
    left, right, stated, solver = truncated_svd(
        given.weight, rank, given.metric, solver=draw.of("auto", "exact", "randomized")
    )
    error, least = given.error(left.double() @ right.double()), given.least(rank)
    allowed = given.allowed(left, right)
    _close("truncated_svd's error over the optimum", error, least, 1e-3, allowed)
    _close("the error that truncated_svd states", stated, error, 2e-3, allowed)
    half = torch.finfo(given.weight.dtype).eps if given.weight.dtype in DTYPES[2:] else 0.0
    _close(
        "spectrum's error",
        error_curve(given.weight, given.metric).relative_error(rank),
        least,
        1e-3,
        allowed + half,
    )
    return solver


def corrected(draw: Draw) -> str:
    """Code a matrix and correct it: the stated error is that of codes and factors together."""
    given = problem(draw, draw.size(), 2 * draw.size(), torch.float32, pulled=False)
    scheme = draw.of(Scheme("int8"), Scheme("int4", 2))
    rank = draw.choose.randint(1, min(given.weight.shape))
    moments = draw.of(None, given.inputs @ given.inputs.T)
    found = quantize_with_correction(given.weight, rank, scheme, given.metric, moments)
    base = dequantize_weight(found.codes, found.scale, scheme)
    error = given.error(base.double() + found.left.double() @ found.right.double())
    allowed = given.allowed(found.left, found.right, base)
    _close("the error that coded_with_residual states", found.relative_error, error, 2e-3, allowed)
    return f"{scheme.name} and factors"


def shared(draw: Draw) -> str:
    """Let two matrices share a basis: both have the error that is stated."""
    columns, dtype = draw.size(), draw.of(*DTYPES)
    given = [problem(draw, draw.size(), columns, dtype) for _ in range(2)]
    rank = draw.choose.randint(1, columns)
    each = [one.metric for one in given]
    scales = [float(one.seen(one.weight.double()).square().sum()) for one in given]
    found = shared_basis([one.weight for one in given], rank, each, [1 / s if s > 0 else 0.0 for s in scales])
    for one, left, stated in zip(given, found.lefts, found.relative_errors, strict=True):
        error = one.error(left.double() @ found.right.double())
        _close("the error that shared_basis states", stated, error, 2e-3, one.allowed(left, found.right))
    return "shared basis"


def multiplied(draw: Draw) -> str:
    """Multiply by a quantized matrix, with gradients and without: it is the dequantized weight's product."""
    rows, columns, tokens = draw.size(), draw.size(), draw.choose.randint(0, 40)
    weight, bias = draw.weight(rows, columns, torch.float32), nn.Parameter(draw.gaussian(rows).float())
    scheme = Scheme("int8")
    if columns % 2 == 0 and draw.of(True, False):
        scheme = Scheme("int4", 2)
    layer = QuantizedLinear.from_weight(weight, draw.of(bias, None), scheme)
    inputs = (draw.gaussian(tokens, columns) * draw.of(1.0, 0.0, draw.scales(tokens, 1, digits=7))).float()
    decoded = dequantize_weight(layer.codes, layer.scale, scheme).double()
    exact = inputs.double() @ decoded.T + (layer.bias.double() if layer.bias is not None else 0.0)
    rounded = inputs.double().abs() @ decoded.abs().T + bias.double().abs()
    step = integer_matmul.SMALLEST_STEP + inputs.double().abs().amax(1, keepdim=True) / 127
    by_integers = 0.51 * step * decoded.abs().sum(1)
    with torch.no_grad():
        without = layer(inputs).double()
    whole = 4 * columns * torch.finfo(torch.float32).eps * rounded
    if not bool(((without - exact).abs() <= whole + (by_integers if scheme.name == "int8" else 0.0)).all()):
        raise Broken(
            f"{layer.extra_repr()} is {float((without - exact).abs().max()):g} from scale · codes · x."
        )
    if not bool(((layer(inputs.clone().requires_grad_()).double() - exact).abs() <= whole).all()):
        raise Broken(f"{layer.extra_repr()} with gradients is another function than scale · codes · x.")
    return f"{scheme.name} products"


def compressed(draw: Draw) -> str:
    """Compress a small model: figures that are finite, or a refusal that changes nothing."""
    model, batches, options = _model(draw)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowKernelWarning)
        try:
            loss = "auto" if options["metric"] == "loss" else draw.of("auto", None)
            stats = None if options["metric"] == "weight" else calibrate(model, batches, loss=loss)
            decided = plan(model, targets=["0", "2"], stats=stats, **options)
            apply(model, decided, stats)
        except LowRankError as error:
            if not _same(model, before):
                raise Broken(f"{options} were refused for {before}, and changed it: {error}") from error
            return "refused"
    for name, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise Broken(f"{options} made {name} of {before} NaN or infinite.")
    for layer in decided.factorized:
        stated = model.get_submodule(layer.name).relative_error
        for figure in (stated, layer.relative_error, layer.held_out_error, layer.loss_increase):
            if figure is not None and not (math.isfinite(figure) and figure >= 0):  # type: ignore[arg-type]
                raise Broken(f"plan({options}) says {layer}, and the layer that it loses {stated}.")
    return "model compressed"


def _model(draw: Draw) -> tuple[nn.Module, list[Tensor], dict[str, Any]]:
    """Return a model of two layers, data for it, and what is asked for."""
    dtype = draw.of(*DTYPES)
    sizes = [draw.of(2, 8, 16, 32, 33) for _ in range(3)]
    layers = []
    for columns, rows in itertools.pairwise(sizes):
        layer = nn.Linear(columns, rows, bias=draw.of(True, False), dtype=dtype)
        layer.weight.data = draw.weight(rows, columns, dtype)
        if layer.bias is not None:
            layer.bias.data = draw.gaussian(rows).to(dtype)
        layers.append(layer)
    scale = draw.of(1.0, draw.scales(1, 1, digits=20), draw.scales(1, sizes[0], digits=20))
    batches = [(draw.gaussian(draw.of(8, 32), sizes[0]) * scale).to(dtype) for _ in range(9)]
    options = draw.of({"rank": draw.of(1, 2, 4)}, {"keep": 0.8}, {"energy": 0.7}, {"error": 0.8})
    options |= {"metric": draw.of("weight", "diagonal", "inputs", "loss"), "round_to": 1}
    options |= draw.of({}, {}, {"quantize": "int8"}, {"quantize": "int4", "group_size": 2, "round_to": 2})
    if "quantize" in options and "rank" in options:
        options["correction"] = draw.of(True, False)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh()), batches, options


def _same(model: nn.Module, before: nn.Module) -> bool:
    now, then = model.state_dict(), before.state_dict()
    alike = [type(part) for part in model.modules()] == [type(part) for part in before.modules()]
    return alike and now.keys() == then.keys() and all(torch.equal(now[k], then[k]) for k in now)


def _close(what: str, found: float, wanted: float, relative: float, allowed: float) -> None:
    """Compare an error with what it should be, unless rounding may make it anything."""
    if not (math.isfinite(found) and found >= 0 and abs(found - wanted) <= relative * wanted + allowed):
        raise Broken(f"{what} is {found:g} and should be {wanted:g}, give or take {allowed:.1g}.")


KINDS = factored, factored, corrected, shared, multiplied, multiplied, compressed


def attempt(seed: int, folder: Path) -> str | Counter[str]:
    """Try one matrix, or one small model of them."""
    draw = Draw(seed)
    kinds: Sequence[Any] = KINDS
    try:
        outcome: str = draw.choose.choice(kinds)(draw)
    except WeightError as error:
        if "beyond what float16 holds" not in str(error):
            raise
        return "refused"
    return outcome

"""Check by running what a user overrules: doubts that reading a model's code leaves about layers.

A subclass of `torch.nn.Linear` is run on random inputs. A layer whose weight some method seems to read is
replaced, for one forward pass of the whole model, by one that computes the same and has no weight to read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from lowrank.calibration.data import Batch
from lowrank.errors import DataError, TargetError
from lowrank.inspection.contexts import evaluating
from lowrank.inspection.inspection import Inspection
from lowrank.nn import layer_type_of
from lowrank.plans.plan import Plan
from lowrank.surgery.replacement import replace_module


def check_subclasses(model: nn.Module, plan: Plan) -> None:
    """Run every overruled layer of a subclass by itself, as it is and as `decompress` would build it again.

    Raises:
        TargetError: If one computes something else than `torch.nn.Linear`, or has more than weight and bias.
    """
    layers = {name: layer for name, layer in model.named_modules() if name in plan.overruled}
    for name, layer in layers.items():
        layer_type = layer_type_of(layer)
        if layer_type is None or layer_type.certain:
            continue
        weight: Tensor = layer.weight.detach()  # type: ignore[union-attr,operator,assignment]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        again = layer_type.layer(
            weight.clone(), None if bias is None else nn.Parameter(bias.detach().clone())
        )
        for one, what in ((copy.deepcopy(layer), ""), (again, ", built again from its weight and bias,")):
            reason = _unlike_linear(one, weight, bias)
            if reason is not None:
                raise _refused(name, f"A {type(layer).__name__}{what} {reason}")


def _refused(name: str, why: str) -> TargetError:
    return TargetError(
        f"{name}: overrule= cannot be followed. {why}. Take it out of overrule=; it stays as it is."
    )


@torch.no_grad()
def _unlike_linear(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return how what ``layer`` computes differs from `torch.nn.functional.linear`, or ``None``."""
    dtype = torch.promote_types(weight.dtype, torch.float32)  # half precision would tell too little
    layer = layer.to(dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    for training in (False, True):
        for shape in ((4, weight.shape[1]), (2, 3, weight.shape[1])):
            x = torch.randn(shape, generator=generator).to(weight.device, dtype)
            expected = functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            try:
                with torch.random.fork_rng(devices=[]):
                    found = type(layer).forward(layer.train(training), x)
            except Exception as error:  # a foreign method may raise anything
                return f"fails on random inputs: {type(error).__name__}: {error}"
            difference = _difference([found], [expected], 64 * torch.finfo(dtype).eps)
            if difference is not None:
                mode = " in training mode" if training else ""
                return f"does not compute what nn.Linear does{mode}: on random inputs {difference}"
    return None


def check_reads(seen: Inspection, plan: Plan, batch: Batch | None) -> None:
    """Run the model on ``batch`` without the weights of overruled layers that a method seems to read.

    It runs in eval mode. What is read in training only, or for other inputs, it does not see.

    Raises:
        DataError: If there is a layer to try and no batch.
        TargetError: If the outputs are others without a weight, or the model fails.
    """
    model = seen.model
    readers = seen.readers if plan.overruled else {}
    found = {name: readers.get(id(model.get_submodule(name))) for name in sorted(plan.overruled)}
    names = [name for name, reader in found.items() if reader is not None]
    if not names:
        return
    if batch is None:
        raise DataError(
            f"{names[0]}: has its weight read by value in {found[names[0]]}. To overrule that, the model has "
            "to run: give inputs=, a batch as the model will get it (--data on the command line)."
        )
    expected = _outputs(model, batch, ())
    if _unlike(model, batch, names, expected) is None:
        return
    for name in names:
        reason = _unlike(model, batch, [name], expected)
        if reason is not None:
            raise _refused(name, f"Its weight is read by value in {found[name]}, and that counts: {reason}")
    raise _refused(", ".join(names), "The outputs change where all of these are without their weights")


def _unlike(model: nn.Module, batch: Batch, names: Sequence[str], expected: list[object]) -> str | None:
    """Return what happens to the outputs when the named layers have no weight to read, or ``None``."""
    try:
        found = _outputs(model, batch, names)
    except DataError as error:
        return f"without its weight {type(model).__name__} fails ({error.__cause__})"
    return _difference(found, expected)


def _outputs(model: nn.Module, batch: Batch, names: Sequence[str]) -> list[object]:
    with torch.random.fork_rng(devices=[]), evaluating(model), _standing_in(model, names):
        torch.default_generator.manual_seed(0)  # that of the CPU alone, which is restored
        return tree_leaves(batch.call(model))


def _difference(found: list[object], expected: list[object], tolerance: float | None = None) -> str | None:
    """Return how tensors differ, or ``None``; the ``tolerance`` is by default √eps of their dtype."""
    ones, others = ([one for one in leaves if isinstance(one, Tensor)] for leaves in (found, expected))
    if [one.shape for one in ones] != [one.shape for one in others]:
        return "the outputs have other shapes"
    for one, other in zip(ones, others, strict=True):
        if torch.equal(one, other):
            continue
        allowed = tolerance if tolerance is not None else _allowed(other)
        distance = float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-300))
        if not distance <= allowed:
            return f"the outputs differ by {distance:.2g} of their norm"
    return None


def _allowed(outputs: Tensor) -> float:
    """Return how much two runs of a model may differ: kernels that add in no fixed order round otherwise."""
    return torch.finfo(outputs.dtype).eps ** 0.5 if outputs.is_floating_point() else 0.0


class _WithoutWeight(nn.Module):
    """Compute what a layer does, with the empty ``weight`` that a factorized one has."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered: the model has one layer there, without children
        like: Tensor = layer.weight  # type: ignore[assignment]
        self.register_buffer("weight", like.detach().new_empty(0))
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        return self.__dict__["layer"](input)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _standing_in(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Hide the weights of the named layers for a while."""
    kept = {name: model.get_submodule(name) for name in names}
    try:
        for name, layer in kept.items():
            replace_module(model, name, _WithoutWeight(layer).train(layer.training))
        yield
    finally:
        for name, layer in kept.items():
            replace_module(model, name, layer)

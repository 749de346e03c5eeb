"""What holds of every model that a call has given back: it copies, pickles, saves, loads, moves, trains."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from harness import Broken
from states import content, difference, state_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo import Batch, Specimen

import lowrank
from lowrank.linalg import dequantize_weight
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuantizedLinear,
    QuantizedModule,
    TiedLinear,
    integer_matmul,
)

OWN = LowRankLinear, LowRankEmbedding, QuantizedModule, TiedLinear
Outputs = list[Tensor]


@dataclass(frozen=True)
class Case:
    """A model that a call has given back, with what it is to be compared with.

    Args:
        model: It.
        dense: The module as it entered the attack.
        specimen: Builds it, and its batches.
        batch: What to call them with.
        folder: A new path to save to.
    """

    model: nn.Module
    dense: nn.Module
    specimen: Specimen
    batch: Batch
    folder: Path

    @cached_property
    def outputs(self) -> Outputs:
        """What the model makes of the batch."""
        return outputs_of(self.model, self.batch)


def called(model: nn.Module, batch: Batch) -> Any:
    """Call ``model`` on a batch."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode for a while."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def outputs_of(model: nn.Module, batch: Batch) -> Outputs:
    """Return the floating tensors that ``model`` makes of a batch, in eval mode."""
    with evaluating(model), torch.no_grad():
        return floating(called(model, batch))


def floating(outputs: Any) -> Outputs:
    """Return the floating tensors in ``outputs``; a cache of keys and values is none of them."""
    values = dict(outputs) if isinstance(outputs, dict) else outputs
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def same(one: Outputs, other: Outputs) -> bool:
    """Tell whether outputs have the same bits."""
    return [content(tensor) for tensor in one] == [content(tensor) for tensor in other]


def finite(outputs: Outputs) -> bool:
    """Tell whether there is no NaN and no infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in outputs)


def distance(one: Outputs, other: Outputs) -> float:
    """Return the relative distance of outputs, in float64."""
    pairs = list(zip(one, other, strict=True))
    separately_saved = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(separately_saved / size) if size else math.sqrt(separately_saved)


def demand(holds: bool, sentence: str) -> None:
    """Raise `Broken` with the sentence unless it holds."""
    if not holds:
        raise Broken(sentence)


def check_outputs(case: Case) -> None:
    """They are finite where the dense model's are, and the same each time, in inference mode too."""
    demand(
        finite(case.outputs) or not finite(outputs_of(case.dense, case.batch)),
        "The outputs are not finite; those of the dense model are.",
    )
    demand(same(outputs_of(case.model, case.batch), case.outputs), "The same call gives other outputs.")
    with torch.inference_mode():
        found = outputs_of(case.model, case.batch)
    demand(same(found, case.outputs), "In inference mode the outputs are others.")


def check_with_gradients(case: Case) -> None:
    """Where gradients are made, other kernels may run, but they compute the same."""
    if any(parameter.is_inference() for parameter in case.model.parameters()):
        return
    with evaluating(case.model):
        found = floating(called(case.model, case.batch))
    if coded(case.model):
        check_integer_products(case)
    near(found, case.outputs, 0.25 if coded(case.model) else 1e-2, "With gradients")


def check_integer_products(case: Case) -> None:
    """Each layer of integers is ``scale · codes · (s·x − c) + b``, but for what rounds its rows of inputs.

    How far that carries a whole model's outputs is not bounded: they may be what two large numbers leave.
    """
    seen: list[tuple[str, QuantizedLinear, Tensor, Tensor]] = []
    layers = [(n, m) for n, m in case.model.named_modules() if isinstance(m, QuantizedLinear)]
    handles = [
        layer.register_forward_hook(lambda m, a, out, name=name: seen.append((name, m, a[0], out)))
        for name, layer in layers
    ]
    try:
        outputs_of(case.model, case.batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer, given, found in seen:
        weight = dequantize_weight(layer.state_dict()["codes"], layer.scale, layer.scheme).double()
        rows = given.detach().double() * (1.0 if layer.smooth_scale is None else layer.smooth_scale.double())
        shift = torch.zeros_like(rows) if layer.input_shift is None else layer.input_shift.double()
        rows, parts = rows - shift, rows.abs() + shift.abs()
        exact, sizes = rows @ weight.T, parts @ weight.abs().T
        if layer.bias is not None:
            exact, sizes = exact + layer.bias.detach().double(), sizes + layer.bias.detach().double().abs()
        # rows are rounded to 255 steps by int8, to the 8 bits of bfloat16 by the kernels of int4
        step = integer_matmul.SMALLEST_STEP + rows.abs().amax(-1, keepdim=True) / 127
        allowed = 0.51 * step * weight.abs().sum(1) if layer.scheme.name == "int8" else 2**-7 * sizes
        allowed = allowed + 4 * torch.finfo(found.dtype).eps * sizes
        if not found.numel():
            continue
        worst = float(((found.detach().double() - exact).abs() - allowed).nan_to_num(0.0).amax())
        demand(worst <= 0, f"{name}: {layer.extra_repr()} is {worst:.2g} beyond what rounding explains.")


def check_autocast(case: Case) -> None:
    """Under autocast it runs where the dense one does, and does nearly the same."""
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = outputs_of(case.dense, case.batch)
        except RuntimeError:  # an LSTM does not
            return
        found = outputs_of(case.model, case.batch)
    if finite(expected):
        plain = not coded(case.model) and not coded(case.dense)  # integers give the dtype of their input
        alike = [t.dtype for t in found] == [t.dtype for t in expected]
        demand(alike or not plain, "Under autocast the outputs have other dtypes.")
        near(found, case.outputs, 0.2 if coded(case.model) else 0.1, "Under autocast")


def near(found: Outputs, wanted: Outputs, most: float, where: str) -> None:
    """Demand that outputs are within a relative distance."""
    if finite(found) and finite(wanted):
        separately_saved = distance(found, wanted)
        demand(
            separately_saved < most or _is_tiny(wanted),
            f"{where} the outputs are {separately_saved:.2g} away.",
        )
    demand(finite(found) or not finite(wanted), f"{where} the outputs are not finite.")


def coded(model: nn.Module) -> bool:
    """Tell whether some weights are integers."""
    return any(isinstance(module, QuantizedModule) for module in model.modules())


def check_copies(case: Case) -> None:
    """A deep copy does the same, and shares nothing with the original."""
    model, batch = case.model, case.batch
    twin = copy.deepcopy(model)
    demand(same(outputs_of(twin, batch), case.outputs), "A deep copy has other outputs.")
    found = difference(_plain(state_of(model)), _plain(state_of(twin)))
    demand(found is None, f"A deep copy differs: {found}")
    _wreck(twin)
    demand(same(outputs_of(model, batch), case.outputs), "A deep copy shares tensors with the original.")
    twin = copy.deepcopy(model)
    _wreck(twin, "persistent")
    twin.load_state_dict(model.state_dict())
    demand(same(outputs_of(twin, batch), case.outputs), "load_state_dict(state_dict()) gives other outputs.")


def check_pickles(case: Case) -> None:
    """What comes out of a pickle does the same."""
    if case.specimen.pickles:
        twin = pickle.loads(pickle.dumps(case.model))
        demand(same(outputs_of(twin, case.batch), case.outputs), "What was pickled has other outputs.")


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without identities, and without gradients, which a copy of a parameter does not have."""
    plain = {}
    for key, value in state.items():
        if "hooks" in key or key == "config" or "attributes" in key:
            continue
        known = "gradients" in key or "module" in key or "parameter" in key or "buffer" in key
        if "gradients" in key or ": module" in key:
            plain[key] = value[0]
        else:
            plain[key] = value[1] if known else value
    return plain


def _wreck(model: nn.Module, which: str = "all") -> None:
    unsaved = {
        id(b) for m in model.modules() for k, b in m._buffers.items() if k in m._non_persistent_buffers_set
    }
    for tensor in [*model.parameters(), *model.buffers()]:
        if which == "all" or id(tensor) not in unsaved:
            tensor.data.zero_()


def laid_out(model: nn.Module) -> nn.Module:
    """Lay out all tensors by rows, as in a file: products of transposed ones may differ by an ulp."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.contiguous()
    return model


def check_saves(case: Case) -> None:
    """What is saved and loaded again has the same state and outputs, to the bit."""
    if not case.specimen.saves:
        return
    lowrank.save(case.model, case.folder)
    if _has_grown(case):
        _check_refused(case)
    elif not (case.folder / "config.json").exists():
        _check_loaded(case, lowrank.load(case.folder, case.specimen.architecture()))
    else:
        _check_loaded(case, lowrank.load(case.folder))
        _check_loaded(case, type(case.model).from_pretrained(case.folder).eval())  # type: ignore[attr-defined]


def check_loads_on_meta(case: Case) -> None:
    """The same into an architecture without data, where all its buffers are saved."""
    if not case.specimen.saves:
        return
    unsaved = any(m._non_persistent_buffers_set or "forward" in vars(m) for m in case.model.modules())
    lowrank.save(case.model, case.folder)
    if unsaved or _has_grown(case) or (case.folder / "config.json").exists():
        return
    with torch.device("meta"):
        architecture = case.specimen.dense().eval()
    _check_loaded(case, lowrank.load(case.folder, architecture))


def _has_grown(case: Case) -> bool:
    """Tell whether layers that are built without a bias have kept one that ``add_bias`` had given."""
    built = dict(case.specimen.architecture().named_modules())
    return any(
        isinstance(getattr(module, "bias", None), nn.Parameter)
        and not getattr(module, "added_bias", False)
        and getattr(built.get(name), "bias", module) is None
        for name, module in case.model.named_modules()
    )


def _check_refused(case: Case) -> None:
    """The architecture has no place for such a bias, so that a load is refused."""
    pretrained = (case.folder / "config.json").exists()
    try:
        lowrank.load(case.folder, None if pretrained else case.specimen.architecture())
    except lowrank.CheckpointError as error:
        demand("bias" in str(error), f"Another reason than the bias is given: {error}")
    else:
        raise Broken("A bias that the architecture has no place for is lost.")


def _check_loaded(case: Case, loaded: nn.Module) -> None:
    model, batch = case.model, case.batch
    saved, got = ({k: bits(v) for k, v in m.state_dict().items()} for m in (model, loaded))
    found = difference(saved, got)
    demand(found is None, f"Loading changes a tensor: {found}")
    types = [{n: type(m).__name__ for n, m in x.named_modules()} for x in (model, loaded)]
    demand(types[0] == types[1], f"Loading changes modules: {difference(*types)}")
    wanted = outputs_of(laid_out(copy.deepcopy(model)), batch)
    demand(same(outputs_of(loaded, batch), wanted), "Loading changes the outputs.")


def bits(tensor: Tensor) -> Any:
    """Return what makes a tensor, however it is laid out."""
    about = content(tensor)
    return about[:3] + about[4:]  # not the strides


def check_trains(case: Case) -> None:
    """A step of SGD on a copy has finite gradients and changes something."""
    batch = case.specimen.batch(4)
    if not case.specimen.trains or not finite(outputs_of(case.model, batch)):
        return
    twin = copy.deepcopy(case.model).train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    parameters = [p for p in twin.parameters() if p.requires_grad and p.numel()]
    if not parameters:
        return
    twin.zero_grad()
    with torch.random.fork_rng(devices=[]):
        loss = sum(tensor.double().square().mean() for tensor in floating(called(twin, batch)))
    demand(isinstance(loss, Tensor) and loss.requires_grad, "The outputs have no gradient in training.")
    loss.backward()  # type: ignore[union-attr]
    moved = [p for p in parameters if p.grad is not None]
    demand(bool(moved), "No parameter has a gradient.")
    before = [content(p) for p in moved]
    for parameter in moved:
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad  # type: ignore[union-attr]
        demand(bool(gradient.isfinite().all()), f"A gradient {tuple(gradient.shape)} is not finite.")
    torch.optim.SGD(moved, lr=0.1).step()
    zero = all(not bool(p.grad.to_dense().any()) for p in moved)  # type: ignore[union-attr]
    demand(zero or before != [content(p) for p in moved], "A step of SGD changes nothing.")


def check_moves(case: Case, dtype: torch.dtype) -> None:
    """In another dtype it runs where the dense one does, and does nearly the same."""
    given = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, case.batch)
    try:
        expected = outputs_of(copy.deepcopy(case.dense).to(dtype), given)
    except (RuntimeError, NotImplementedError):
        return
    if not finite(expected):
        return
    moved = copy.deepcopy(case.model).to(dtype)
    for name, parameter in moved.named_parameters():
        demand(parameter.dtype == dtype, f"{name} is {parameter.dtype} after .to({dtype}).")
    found = outputs_of(moved, given)
    dtypes = [[t.dtype for t in outputs] for outputs in (found, expected)]
    demand(dtypes[0] == dtypes[1], f"In {dtype} the outputs are {dtypes[0]}, not {dtypes[1]}.")
    near(found, case.outputs, 0.2 if coded(case.model) else 0.1, f"In {dtype}")


def _is_tiny(outputs: Outputs) -> bool:
    return all(not t.numel() or float(t.abs().max()) < 1e-3 for t in outputs)


def check_on_meta(case: Case) -> None:
    """On the meta device it gives outputs of the same shapes, where the dense one does."""
    given = tree_map(lambda t: t.to("meta"), case.batch)
    try:
        outputs_of(copy.deepcopy(case.dense).to("meta"), given)
    except (RuntimeError, NotImplementedError, ValueError):
        return
    found = [tuple(t.shape) for t in outputs_of(copy.deepcopy(case.model).to("meta"), given)]
    wanted = [tuple(t.shape) for t in case.outputs]
    demand(found == wanted, f"On the meta device the outputs have shapes {found}, not {wanted}.")


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights ``(out, in)`` of layers that may be factorized, as they are now, in float64."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module) is nn.Linear and not weight.is_meta:  # type: ignore[union-attr]
            found[name] = weight.detach().double().clone()  # type: ignore[union-attr]
        elif type(module).__name__ == "Conv1D" and isinstance(weight, nn.Parameter):
            found[name] = weight.detach().double().T.clone()
    return found


def check_errors(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The stated error of each new layer is the one of its factors."""
    for name, module in model.named_modules():
        if not isinstance(module, LowRankLinear) or name not in before or module.relative_error is None:
            continue
        parts = module.up, module.down
        if module.base is not None or any(isinstance(part, QuantizedLinear) for part in parts):
            continue
        weight, (up, down) = before[name], (part.weight.detach().double() for part in parts)
        norm = float(weight.norm())
        measured = float((weight - up @ down).norm()) / norm if norm else 0.0
        demand(
            abs(measured - module.relative_error) < 1e-3 + 0.01 * measured,
            f"{name}: the relative error is {measured:.6g}, and {module.relative_error:.6g} is stated.",
        )


CHECKS: dict[str, tuple[float, Callable[[Case], None]]] = {
    "outputs": (1.0, check_outputs),
    "gradients": (0.3, check_with_gradients),
    "autocast": (0.1, check_autocast),
    "copy": (0.3, check_copies),
    "pickle": (0.3, check_pickles),
    "save and load": (0.3, check_saves),
    "load on meta": (0.1, check_loads_on_meta),
    "train": (0.3, check_trains),
    "half": (0.1, lambda case: check_moves(case, torch.float16)),
    "bfloat16": (0.1, lambda case: check_moves(case, torch.bfloat16)),
    "double": (0.1, lambda case: check_moves(case, torch.float64)),
    "meta": (0.05, check_on_meta),
}
"""What is checked after a call, and how often."""

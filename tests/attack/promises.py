"""What holds of every model that a call has given back: it copies, pickles, saves, loads, moves, trains."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Broken
from states import content, difference, state_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo import Batch, Specimen

import lowrank
from lowrank.nn import Coded, LowRankEmbedding, LowRankLinear, QuantizedLinear, TiedLinear

OWN = LowRankLinear, LowRankEmbedding, Coded, TiedLinear
Outputs = list[Tensor]


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
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(apart / size) if size else math.sqrt(apart)


def demand(holds: bool, sentence: str) -> None:
    """Raise `Broken` with the sentence unless it holds."""
    if not holds:
        raise Broken(sentence)


def check_copies(model: nn.Module, batch: Batch) -> None:
    """A deep copy does the same, and shares nothing with the original."""
    expected = outputs_of(model, batch)
    twin = copy.deepcopy(model)
    demand(same(outputs_of(twin, batch), expected), "A deep copy has other outputs.")
    found = difference(_plain(state_of(model)), _plain(state_of(twin)))
    demand(found is None, f"A deep copy differs: {found}")
    _wreck(twin)
    demand(same(outputs_of(model, batch), expected), "A deep copy shares tensors with the original.")
    twin = copy.deepcopy(model)
    _wreck(twin, "persistent")
    twin.load_state_dict(model.state_dict())
    demand(same(outputs_of(twin, batch), expected), "load_state_dict(state_dict()) gives other outputs.")


def check_pickles(model: nn.Module, batch: Batch) -> None:
    """What comes out of a pickle does the same."""
    twin = pickle.loads(pickle.dumps(model))
    demand(same(outputs_of(twin, batch), outputs_of(model, batch)), "What was pickled has other outputs.")


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


def aligned(model: nn.Module) -> nn.Module:
    """Lay out all tensors in one way: products of unaligned or transposed ones may differ by an ulp."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def check_saves(model: nn.Module, specimen: Specimen, batch: Batch, folder: Path, on_meta: bool) -> None:
    """What is saved and loaded again has the same state and outputs, to the bit."""
    lowrank.save(model, folder)
    if (folder / "config.json").exists():
        loaded = lowrank.load(folder)
    elif on_meta:
        with torch.device("meta"):
            architecture = specimen.dense()
        loaded = lowrank.load(folder, architecture)
    else:
        loaded = lowrank.load(folder, specimen.architecture())
    saved, got = ({k: content(v)[:3:2] for k, v in m.state_dict().items()} for m in (model, loaded))
    demand(saved.keys() == got.keys(), f"Loading changes the names of tensors: {saved.keys() ^ got.keys()}.")
    for name, tensor in model.state_dict().items():
        demand(bits(tensor) == bits(loaded.state_dict()[name]), f"Loading changes the tensor {name}.")
    demand(
        same(outputs_of(aligned(loaded), batch), outputs_of(aligned(copy.deepcopy(model)), batch)),
        "Loading changes the outputs.",
    )
    types = [{n: type(m).__name__ for n, m in x.named_modules()} for x in (model, loaded)]
    demand(types[0] == types[1], f"Loading changes modules: {difference(*types)}")


def bits(tensor: Tensor) -> Any:
    """Return what makes a tensor, however it is laid out."""
    about = content(tensor)
    return about[:3] + about[4:]  # not the strides


def check_trains(model: nn.Module, batch: Batch) -> None:
    """A step of SGD on a copy has finite gradients and changes something."""
    twin = copy.deepcopy(model).train()
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


def check_moves(model: nn.Module, dense: nn.Module, batch: Batch, dtype: torch.dtype) -> None:
    """In another dtype it runs where the dense one does, and does nearly the same."""
    given = tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, batch)
    try:
        expected = outputs_of(copy.deepcopy(dense).to(dtype), given)
    except (RuntimeError, NotImplementedError):
        return
    if not finite(expected):
        return
    moved = copy.deepcopy(model).to(dtype)
    for name, parameter in moved.named_parameters():
        demand(parameter.dtype == dtype, f"{name} is {parameter.dtype} after .to({dtype}).")
    found, whole = outputs_of(moved, given), outputs_of(model, batch)
    demand(
        [t.dtype for t in found] == [t.dtype for t in expected],
        f"In {dtype} the outputs are {found[0].dtype}.",
    )
    if finite(found) and finite(whole):
        worst = 0.2 if any(isinstance(m, Coded) for m in model.modules()) else 0.1
        apart = distance(found, whole)
        demand(apart < worst or _is_tiny(whole), f"In {dtype} the outputs are {apart:.2g} away.")
    demand(
        finite(found) or not finite(whole),
        f"In {dtype} the outputs are not finite; those of the dense model are.",
    )


def _is_tiny(outputs: Outputs) -> bool:
    return all(not t.numel() or float(t.abs().max()) < 1e-3 for t in outputs)


def check_on_meta(model: nn.Module, batch: Batch) -> None:
    """On the meta device it gives outputs of the same shapes."""
    moved = copy.deepcopy(model).to("meta")
    given = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, batch)
    shapes = [[tuple(t.shape) for t in outputs_of(*pair)] for pair in ((model, batch), (moved, given))]
    demand(
        shapes[0] == shapes[1], f"On the meta device the outputs have shapes {shapes[1]}, not {shapes[0]}."
    )


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

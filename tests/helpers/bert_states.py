"""All that a refused request must leave as it was; and errors of factors, measured apart from the library."""

import torch
from torch import Tensor, nn

from lowrank.nn import layer_type_of
from lowrank.surgery.inheritance import HOOKS as PLACES_OF_HOOKS


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a refused request must leave as it was: identities, bits, flags and hooks."""
    return {
        "modules": {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
        "parameters": {
            n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
        },
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {(n, h): dict(vars(m)[h] or {}) for n, m in model.named_modules() for h in PLACES_OF_HOOKS},
        "state": {n: t if t.is_meta else t.detach().clone() for n, t in model.state_dict().items()},
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    for part in ("modules", "parameters", "training", "hooks"):
        assert after[part] == before[part]
    assert after["state"].keys() == before["state"].keys()
    for name, tensor in before["state"].items():
        new = after["state"][name]
        assert new.dtype == tensor.dtype
        assert new.is_meta == tensor.is_meta
        if not tensor.is_meta:  # bytes, so that NaN equals NaN
            assert torch.equal(new.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def frobenius_errors(model: nn.Module, dense: dict[str, Tensor]) -> dict[str, float]:
    """Measured apart from the library, in float64."""
    errors = {}
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        product = layer.up.weight.detach().double() @ layer.down.weight.detach().double()
        errors[name] = float((weight - product).norm() / weight.norm())
    return errors


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every weight as ``(out, in)`` in float64, by layer name."""
    kinds = {name: (m, layer_type_of(m)) for name, m in model.named_modules()}
    return {name: kind.weight(m).detach().double().clone() for name, (m, kind) in kinds.items() if kind}

"""Use a model in another mode for a while, and leave it as it was, also after an error or an interrupt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and undo it module by module."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextlib.contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Let only ``parameters`` have gradients, in eval mode; undo both, and put the user's gradients back."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in required}
    with eval_mode(model):
        try:
            for parameter in required:
                parameter.requires_grad_(False)
                parameter.grad = None
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, requires in required.items():
                parameter.requires_grad_(requires)
                parameter.grad = gradients[parameter]

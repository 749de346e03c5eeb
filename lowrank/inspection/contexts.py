"""Use a model in another mode for a while, and leave it as it was, also after an error or an interrupt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowrank.errors import WeightError
from lowrank.inspection.interrupts import uninterrupted


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Listen with hooks, and remove these, and no others, at the end, whatever happens.

    Args:
        handles: A generator that registers one hook at each step, and yields its handle.
    """
    registered: list[RemovableHandle] = []
    try:
        with uninterrupted():
            registered.extend(handles)
        yield
    finally:
        with uninterrupted():
            for handle in registered:
                handle.remove()


def check_can_train(model: nn.Module) -> None:
    """Refuse parameters that were made in inference mode, where they are used outside of it.

    Raises:
        WeightError: If there is one: it can neither have a gradient nor be changed.
    """
    if torch.is_inference_mode_enabled():
        return
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise WeightError(
                f"{name}: was made in inference mode, and can neither have gradients nor be changed outside "
                "of it. Build or load the model outside of torch.inference_mode()."
            )


def check_has_data(model: nn.Module) -> None:
    """Refuse a model that is to run and has parameters on the meta device.

    Raises:
        WeightError: If it has.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise WeightError(f"{name}: on the meta device, without data. Load the weights first.")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and undo it module by module.

    Raises:
        WeightError: As `check_has_data`: the model is going to run.
    """
    check_has_data(model)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        with uninterrupted():
            for module, was in training.items():
                module.training = was


@contextlib.contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Let only ``parameters`` have gradients, in eval mode; undo both, and put the user's gradients back.

    Raises:
        WeightError: As `check_can_train`.
    """
    check_can_train(model)
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
            with uninterrupted():
                for parameter, requires in required.items():
                    parameter.requires_grad_(requires)
                    parameter.grad = gradients[parameter]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without gradients, and undo it."""
    with eval_mode(model), torch.no_grad():
        yield

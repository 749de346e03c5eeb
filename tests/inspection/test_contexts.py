"""Another mode for a while: whatever happens in it, the model is as it was afterwards."""

import contextlib

import pytest
import torch
from torch import nn

from lowrank import WeightError
from lowrank.inspection.contexts import check_can_train, eval_mode, evaluating, hooked, training_only


class Stop(BaseException):
    """An interrupt that nobody catches by accident."""


@pytest.fixture
def model() -> nn.Sequential:
    """A model with mixed modes, a frozen weight and a gradient of the user's."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    model[0].eval()
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 4)
    return model


def state(model: nn.Module) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [(p.requires_grad, id(p.grad)) for p in model.parameters()],
    ]


@pytest.mark.parametrize("context", [eval_mode, evaluating, training_only], ids=lambda c: c.__name__)
@pytest.mark.parametrize("error", [None, ValueError, Stop], ids=["nothing", "an-error", "an-interrupt"])
def test_modes_flags_and_gradients_come_back(model, context, error):
    before = state(model)
    with contextlib.suppress(ValueError, Stop), context(model):
        assert not any(module.training for module in model.modules())
        if error is not None:
            raise error
    assert state(model) == before


def test_only_the_parameters_asked_for_have_gradients(model):
    wanted = model[2].bias
    with training_only(model, [wanted]):
        assert [p for p in model.parameters() if p.requires_grad] == [wanted]
        model(torch.ones(2, 4)).sum().backward()
        assert wanted.grad is not None
    assert wanted.grad is None
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))


@pytest.mark.parametrize("error", [None, Stop], ids=["nothing", "an-interrupt"])
def test_hooks_of_ones_own_go_and_those_of_others_stay(model, error):
    heard: list[str] = []
    model[0].register_forward_hook(lambda *_: heard.append("user"))
    with (
        contextlib.suppress(Stop),
        hooked(layer.register_forward_hook(lambda *_: heard.append("own")) for layer in model),
    ):
        model(torch.ones(2, 4))
        if error is not None:
            raise error
    assert heard == ["user", "own", "own", "own"]
    model(torch.ones(2, 4))
    assert heard[4:] == ["user"]


def test_hooks_that_were_registered_before_an_error_go_too(model):
    heard: list[str] = []

    def handles():
        yield model[0].register_forward_hook(lambda *_: heard.append("own"))
        raise ValueError("the second layer takes no hook")

    with pytest.raises(ValueError, match="takes no hook"), hooked(handles()):
        pytest.fail("must not be entered")
    model(torch.ones(2, 4))
    assert heard == []


def test_a_model_without_data_is_not_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = nn.Parameter(torch.empty(4, device="meta"))
    message = r"1\.bias: on the meta device, without data"
    with pytest.raises(WeightError, match=message), eval_mode(model):
        pytest.fail("must not be entered")


def test_parameters_of_inference_mode_can_be_used_there_and_are_refused_elsewhere():
    with torch.inference_mode():
        model = nn.Linear(4, 4)
        check_can_train(model)
    with pytest.raises(WeightError, match=r"weight: .*inference"):
        check_can_train(model)

"""What is expected of other data, from what trials on few or many samples have found."""

import copy
import math
import statistics

import pytest
import torch
from random_tensors import gaussian
from torch import Tensor, nn

from lowrank import apply, calibrate, plan
from lowrank.calibration.held_out_errors import HeldOutErrors, coherences

pytestmark = pytest.mark.filterwarnings("ignore::lowrank.FewTokensWarning")  # few tokens are the subject


def test_errors_that_the_tokens_of_a_sample_have_in_common_add_up_before_they_are_squared():
    """Eight equal tokens, of which the output is the mean: one token's share would be an eighth of it."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    model = Mean()
    stats = calibrate(model, [gaussian(50, 1, 16, seed=i).expand(50, 8, 16) for i in range(8)])
    decided = plan(model, keep=0.5, round_to=1, stats=stats)
    small, others = (
        apply(copy.deepcopy(model), decided, stats),
        gaussian(4000, 1, 16, seed=99).expand(4000, 8, 16),
    )
    with torch.no_grad():
        true = float(0.5 * (small(others) - model(others)).square().sum(-1).mean())
    assert decided["inner"].loss_increase == pytest.approx(true, rel=0.3)  # 100 squares are tried: √(2/100)


def drawn(samples: int, coherence: float, seed: int) -> HeldOutErrors:
    """Errors of ``samples`` of 1,000 tokens: of the tokens as expected, of the samples as drawn."""
    squares = gaussian(samples, seed=seed).double().square().sum() * coherence * 1000
    falling = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    tokens = 1000 * samples * falling
    return HeldOutErrors(1000 * samples, samples, tokens, squares * falling, tokens)


def test_many_samples_of_a_layer_speak_for_themselves():
    wanted = {"a": 0.5, "b": 1.0, "c": 8.0}
    found = coherences({name: drawn(4000, value, 1) for name, value in wanted.items()})
    for name, value in wanted.items():
        assert found[name] == pytest.approx(
            value, rel=0.1
        )  # √(2/4000) = 0.02, and another half of it drawn in


def test_few_samples_of_many_layers_speak_for_all_of_them():
    """One layer's four squares say little; 200 layers' do."""
    held = {str(i): drawn(4, 1.5, i) for i in range(200)}
    alone = [math.log(float(errors.joint[1] / errors.measured[1])) for errors in held.values()]
    found = [math.log(value) for value in coherences(held).values()]
    assert statistics.fmean(found) == pytest.approx(math.log(1.5), abs=0.2)  # √(ψ'(2)/200) = 0.06
    assert statistics.fmean(alone) < math.log(1.5) - 0.1  # ψ(2) − log 2 = −0.27
    assert statistics.pstdev(found) < 0.4 * statistics.pstdev(alone)


def test_layers_of_which_nothing_is_known_get_what_the_others_have():
    none = torch.zeros(5, dtype=torch.float64)
    held = {"a": drawn(4000, 2.0, 1), "b": HeldOutErrors(0, 0, none, none, none)}
    assert coherences(held)["b"] == coherences(held)["a"]
    assert coherences({"b": held["b"]}) == {"b": 1.0}


def test_sums_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="of different sizes"):
        HeldOutErrors(1, 1, torch.zeros(3), torch.zeros(4), torch.zeros(3))

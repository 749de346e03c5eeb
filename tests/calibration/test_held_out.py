"""Predictions are tried on tokens that the statistics have not seen: against factors made one by one."""

import pytest
import torch
from random_tensors import gaussian
from saved_models import built
from tied_tables import FAMILIES
from torch import nn

import lowrank
from lowrank import calibrate
from lowrank.linalg import Gram, Metric, error_curve

pytestmark = pytest.mark.filterwarnings("ignore::lowrank.FewTokensWarning")  # few tokens are the subject


@pytest.mark.parametrize("name", ["untied", "llama"])
def test_a_trial_on_held_out_tokens_corrects_the_prediction(name, tiny_bert):
    """Calibrated on other tokens than are held out, an embedding costs more than it seems to."""
    model, table = tiny_bert, "embeddings.word_embeddings"
    if name != "untied":
        model, table = built(FAMILIES[name][0]), FAMILIES[name][1]
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 40, (8, 24), generator=generator)} for _ in range(32)]
    alike = lowrank.calibrate(model, data, targets=[table])
    for batch in data[3::4]:  # those that are held out
        batch["input_ids"] += 50
    other = lowrank.calibrate(model, data, targets=[table])
    assert 0.4 < alike.held_out_ratio(table) < 4
    assert other.held_out_ratio(table) > 1.5 * alike.held_out_ratio(table)
    assert set(other.held_out) == {table}  # the head's errors count there


def test_shrinkage_makes_predictions_from_few_tokens_hold_on_others():
    """40 tokens of 64 independent features look as if they lay in a subspace; the true C is I."""
    model = nn.Sequential(nn.Linear(64, 64))
    few = calibrate(model, [gaussian(10, 64, seed=i) for i in range(4)], loss=None)
    weight, true = model[0].weight.detach(), error_curve(model[0].weight).squared_error(32)
    naive = error_curve(weight, Metric(Gram(few.moments("0").second(centred=True)))).squared_error(32)
    shrunk = error_curve(weight, few.metric("0", "inputs", centred=True)).squared_error(32)
    assert naive < 0.3 * true
    assert shrunk > 0.6 * true
    # Factors of 30 tokens are tried on 40 tokens that lose 32 directions each: √(2/1280) = 0.04, and a bias.
    assert few.held_out_ratio("0") == pytest.approx(1, abs=0.25)


def test_with_many_tokens_the_prediction_holds_without_help():
    model = nn.Sequential(nn.Linear(64, 64))
    many = calibrate(model, [gaussian(1000, 64, seed=i) for i in range(4)], loss=None)
    # What is fitted to 3,000 tokens of 64 features is better there than elsewhere by about 2 · 64/3000.
    assert many.held_out_ratio("0") == pytest.approx(1, abs=0.1)


def test_held_out_ratios_see_that_inputs_and_gradients_depend_on_each_other():
    """The loss feels a token only where its inputs are large, which the product of moments cannot know."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            return self.inner(x) * (x.norm(dim=-1, keepdim=True) > 8)

    data = [gaussian(200, 16, seed=i) * torch.tensor([[1.0], [4.0]]).repeat(100, 1) for i in range(8)]
    independent = calibrate(nn.Sequential(nn.Linear(16, 16)), data)
    dependent = calibrate(Gated(), data)
    assert independent.held_out_ratio("0") == pytest.approx(1, abs=0.3)  # of 400 tokens of two scales
    assert dependent.held_out_ratio("inner") > 1.5

"""Predictions are tried on tokens that the statistics have not seen: against factors made one by one."""

import copy

import pytest
import torch
from random_tensors import gaussian
from saved_models import built
from tied_tables import FAMILIES
from torch import Tensor, nn

import lowrank
from lowrank import apply, calibrate, plan
from lowrank.linalg import Gram, Metric, error_curve, truncated_svd

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


def test_held_out_batches_are_part_of_the_statistics_in_the_end(mlp, data):
    stats = calibrate(mlp, data)
    assert stats.tokens == 200
    assert stats.held_out.keys() == {"0", "2"}


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Tanh(), nn.Linear(16, 10, bias=bias))


def pooled_square(outputs: Tensor, batch: Tensor) -> Tensor:
    """A user's loss, in which the tokens of a sample meet before anything is squared."""
    return outputs.mean(1).square().sum(-1).mean()


def errors_one_by_one(
    model: nn.Sequential, name: str, fitted: Tensor, other: Tensor, rank: int, differentiate: bool
) -> float:
    """Factor a layer by the statistics of ``fitted``, and sum its squared errors over ``other``."""
    stats = calibrate(model, [fitted], loss=pooled_square if differentiate else None)
    layer: nn.Linear = model.get_submodule(name)
    centred = layer.bias is not None
    metric = stats.metric(name, "loss" if differentiate else "inputs", centred)
    weight = layer.weight.detach()
    left, right, *_ = truncated_svd(weight.double(), rank, metric)
    change = weight.double() - left @ right
    mean = stats.moments(name).mean if centred else 0.0
    total = 0.0
    for sample in other:
        kept: dict[str, Tensor] = {}

        def keep(_: nn.Module, args: tuple[Tensor], output: Tensor, kept: dict[str, Tensor] = kept) -> None:
            output.retain_grad()
            kept.update(read=args[0].detach().double(), returned=output)

        handle = layer.register_forward_hook(keep)
        pooled_square(model(sample[None]), sample).backward()
        handle.remove()
        lost = (kept["read"] - mean) @ change.T  # (1, tokens, out)
        if differentiate:
            total += float((lost * kept["returned"].grad).sum().square())
        else:
            total += float(lost.square().sum())
    return total


@pytest.mark.parametrize("bias", [True, False], ids=["with-bias", "without-bias"])
@pytest.mark.parametrize("differentiate", [True, False], ids=["loss", "inputs"])
@pytest.mark.parametrize("name", ["0", "2"], ids=["tall", "wide"])
def test_each_part_is_tried_at_every_rank_with_the_factors_of_the_others(name, differentiate, bias):
    model = net(bias)
    one, other = gaussian(6, 9, 12, seed=1) + 0.5, gaussian(5, 9, 12, seed=2) + 0.5
    stats = calibrate(model, [one, other], loss=pooled_square if differentiate else None)
    held = stats.held_out[name]
    assert held.tokens == 11 * 9
    assert len(held.measured) == min(model.get_submodule(name).weight.shape) + 1
    for rank in (1, 4, 9):
        expected = sum(
            errors_one_by_one(model, name, *parts, rank, differentiate)
            for parts in ((one, other), (other, one))
        )
        assert float(held.measured[rank]) == pytest.approx(expected, rel=1e-3)  # activations are float32


def test_the_statistics_in_the_end_are_those_of_all_parts():
    model, data = net(), [gaussian(3, 12, seed=i) for i in range(6)]
    stats = calibrate(model, data)
    rows = torch.cat(data).double()
    assert (stats.tokens, stats.terms, stats.gradients["2"].tokens) == (18, 18, 18)
    torch.testing.assert_close(stats.moments("0").products, rows.T @ rows, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("samples", [3, 8, 32])
def test_the_predicted_loss_holds_on_other_samples_however_few_were_seen(samples):
    """White inputs in 64 dimensions: the samples say nothing of those that they lack."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    stats = calibrate(model, [gaussian(1, 64, seed=i) for i in range(samples)])
    decided = plan(model, keep=0.5, stats=stats)
    small, others = apply(copy.deepcopy(model), decided, stats), gaussian(4000, 64, seed=99)
    with torch.no_grad():
        true = float(0.5 * (small(others) - model(others)).square().sum(-1).mean())
    predicted = decided["0"].loss_increase
    assert 0.5 * true < predicted < 2 * true
    if samples >= 32:
        assert true / 1.5 < predicted < 1.5 * true


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


def test_few_samples_get_several_draws_of_the_objective():
    """One probe for each of 4 samples would leave 4 directions of 16 in the outputs' metric."""
    stats = calibrate(nn.Sequential(nn.Linear(16, 16)), [gaussian(1, 16, seed=i) for i in range(4)])
    found = stats.gradients["0"]
    assert (found.tokens, stats.terms) == (4, 4)
    assert int(torch.linalg.matrix_rank(found.products)) == 16
    assert float(found.products.trace() / found.tokens / 16) == pytest.approx(1, abs=0.2)  # E[vvᵀ] = I

"""Few data are tried part by part on what the others gave: against factors made one by one."""

import copy

import pytest
import torch
from random_tensors import gaussian
from torch import Tensor, nn

from lowrank import FewTokensWarning, apply, calibrate, plan
from lowrank.calibration.cross_fitting import ENOUGH_SAMPLES, WAITING_TOKENS
from lowrank.linalg import truncated_svd

pytestmark = pytest.mark.filterwarnings("ignore::lowrank.FewTokensWarning")  # few tokens are the subject


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
) -> tuple[float, float]:
    """Factor a layer by the statistics of ``fitted``, and sum its squared errors over ``other``.

    Returns:
        The sum of the tokens' squares, and of the samples'.
    """
    stats = calibrate(model, [fitted], loss=pooled_square if differentiate else None)
    layer: nn.Linear = model.get_submodule(name)
    centred = layer.bias is not None
    metric = stats.metric(name, "loss" if differentiate else "inputs", centred)
    weight = layer.weight.detach()
    left, right, *_ = truncated_svd(weight.double(), rank, metric)
    change = weight.double() - left @ right
    mean = stats.moments(name).mean if centred else 0.0
    by_token = by_sample = 0.0
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
            lost = lost * kept["returned"].grad
            by_sample += float(lost.sum().square())
            by_token += float(lost.sum(-1).square().sum())
        else:
            by_token += float(lost.square().sum())
    return by_token, by_sample if differentiate else by_token


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
        expected = [
            errors_one_by_one(model, name, *parts, rank, differentiate)
            for parts in ((one, other), (other, one))
        ]
        by_token, by_sample = (sum(part) for part in zip(*expected, strict=True))
        assert float(held.measured[rank]) == pytest.approx(by_token, rel=1e-3)  # activations are float32
        assert float(held.joint[rank]) == pytest.approx(by_sample, rel=1e-3)


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


def test_few_samples_get_several_draws_of_the_objective():
    """One probe for each of 4 samples would leave 4 directions of 16 in the outputs' metric."""
    stats = calibrate(nn.Sequential(nn.Linear(16, 16)), [gaussian(1, 16, seed=i) for i in range(4)])
    found = stats.gradients["0"]
    assert (found.tokens, stats.terms) == (4, 4)
    assert int(torch.linalg.matrix_rank(found.products)) == 16
    assert float(found.products.trace() / found.tokens / 16) == pytest.approx(1, abs=0.2)  # E[vvᵀ] = I


def test_where_the_last_part_is_enough_it_alone_is_tried():
    model, sizes = net(), {}
    for samples in (ENOUGH_SAMPLES // 4, ENOUGH_SAMPLES):
        stats = calibrate(model, [gaussian(samples, 12, seed=i) for i in range(4)])
        sizes[samples] = stats.held_out["0"].samples
        assert stats.tokens == 4 * samples
    assert sizes == {ENOUGH_SAMPLES // 4: ENOUGH_SAMPLES, ENOUGH_SAMPLES: ENOUGH_SAMPLES}


def test_a_layer_that_a_part_of_the_data_does_not_reach_is_calibrated_on_the_others():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) if len(x) == 3 else self.second(x)

    data = [gaussian(size, 12, seed=size) for size in (3, 3, 3, 2)]
    stats = calibrate(Either(), data)
    assert (stats.moments("first").weight, stats.moments("second").weight) == (9, 2)
    assert set(stats.held_out) == {"first"}  # of the second nothing was known when its part was tried


def test_batches_too_large_to_wait_are_calibrated_on_and_that_nothing_is_held_out_is_said():
    data = [torch.randint(0, 9, (4, WAITING_TOKENS // 3)) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    with pytest.warns(FewTokensWarning, match="has held out no batch"):
        stats = calibrate(model, data, loss=None)
    assert stats.moments("1").weight == sum(batch.numel() for batch in data) and not stats.held_out

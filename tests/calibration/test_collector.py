"""Calibration against slow oracles: sums over all tokens at once, and gradients taken one by one."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import (
    CheckpointError,
    DataError,
    LowRankError,
    StatsError,
    WeightError,
    calibrate,
    compress,
    decompress,
)
from lowrank.calibration.data import batches
from lowrank.linalg import Gram, Metric, error_curve


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def data():
    return [made(50, 64, seed=i) + 0.3 for i in range(4)]


def summed(outputs, batch):
    """A user's loss: the mean over the batch of a smooth function of the outputs."""
    return outputs.square().sum(-1).mean()


def test_moments_are_those_of_all_tokens_at_once(mlp, data):
    stats = calibrate(mlp, data)
    everything = torch.cat(data).double()
    moments = stats.moments("0")
    torch.testing.assert_close(moments.mean, everything.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        moments.second(centred=True), torch.cov(everything.T, correction=0), rtol=1e-4, atol=1e-5
    )
    hidden = mlp[1](mlp[0](torch.cat(data))).detach().double()
    torch.testing.assert_close(
        stats.moments("2").second(centred=False), hidden.T @ hidden / len(hidden), rtol=1e-4, atol=1e-5
    )


def test_gradients_are_those_of_the_users_loss_for_each_sample(mlp, data):
    stats = calibrate(mlp, data, loss=summed)
    outputs = mlp(torch.cat(data)).detach().double()
    expected = 4 * outputs.T @ outputs / len(outputs)  # ∂/∂y of |y|² is 2y
    torch.testing.assert_close(stats.gradients["2"].products / stats.tokens, expected, rtol=1e-4, atol=1e-4)


def test_a_tall_layers_gradients_are_pulled_back_to_its_inputs(mlp, data):
    stats = calibrate(mlp, data, loss=summed)
    assert stats.gradients["0"].pulled_back
    inputs = torch.cat(data).requires_grad_()
    mlp(inputs).square().sum().backward()
    gradient = inputs.grad.double()  # Wᵀ g
    expected = gradient.T @ gradient / len(gradient)
    torch.testing.assert_close(stats.gradients["0"].products / stats.tokens, expected, rtol=1e-4, atol=1e-4)


def test_the_fisher_of_a_classifier_is_that_of_its_own_predictions():
    """With labels drawn from the prediction p, E[ggᵀ] at the logits is diag(p) − ppᵀ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = model

        def forward(self, x):
            return {"logits": self.only(x)}

    classifier = Classifier()
    data = [made(1, 4).expand(4000, 4)]
    stats = calibrate(classifier, data)
    p = classifier(data[0][:1])["logits"].softmax(-1)[0].detach().double()
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(stats.gradients["only.0"].products / stats.tokens, expected, rtol=0, atol=0.05)


def test_layers_that_read_one_tensor_share_its_moments(tiny_bert):
    ids = torch.randint(99, (2, 6), generator=torch.Generator().manual_seed(0))
    stats = calibrate(tiny_bert, [{"input_ids": ids}])
    attention = "encoder.layer.0.attention.self"
    assert {stats.sources[f"{attention}.{name}"] for name in ("query", "key", "value")} == {
        f"{attention}.query"
    }
    assert stats.sources["encoder.layer.0.output.dense"] == "encoder.layer.0.output.dense"
    assert len(stats.inputs) == 2 * 4


class ChangesItsInput(nn.Module):
    """Two layers read one tensor, which is another by then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x.clone()
        first = self.first(x)
        x += 1
        return first + self.second(x)


def test_a_tensor_changed_in_place_is_another():
    stats = calibrate(ChangesItsInput(), [torch.randn(4, 8)], loss=None)
    assert stats.sources == {"first": "first", "second": "second"}


def test_padding_does_not_count(tiny_bert):
    ids = torch.randint(1, 99, (1, 6), generator=torch.Generator().manual_seed(0))
    plain = calibrate(tiny_bert, [{"input_ids": ids, "attention_mask": torch.ones(1, 6, dtype=torch.long)}])
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1),
        "attention_mask": torch.cat([torch.ones(1, 6), torch.zeros(1, 5)], dim=1).long(),
    }
    masked = calibrate(tiny_bert, [padded])
    assert masked.tokens == plain.tokens == 6
    for name in plain.sources:
        torch.testing.assert_close(
            masked.moments(name).products, plain.moments(name).products, rtol=1e-3, atol=1e-3
        )
    for name in plain.gradients:
        torch.testing.assert_close(
            masked.gradients[name].products, plain.gradients[name].products, rtol=1e-3, atol=1e-3
        )


def test_statistics_of_two_halves_add_up_to_those_of_the_whole(mlp, data):
    whole = calibrate(mlp, data, loss=summed)
    nibbles = calibrate(mlp, data[:2], loss=summed) + calibrate(mlp, data[2:], loss=summed)
    assert nibbles.fingerprint == whole.fingerprint
    assert (nibbles.tokens, nibbles.terms) == (whole.tokens, whole.terms)
    for name in whole.sources:
        for mine, its in (
            (nibbles.moments(name).products, whole.moments(name).products),
            (nibbles.gradients[name].products, whole.gradients[name].products),
        ):  # products are float32, and the batches meet in other groups
            assert (mine - its).norm() <= 1e-6 * its.norm()


def test_without_a_loss_there_are_no_gradients_and_the_same_moments(mlp, data):
    bare, full = calibrate(mlp, data, loss=None), calibrate(mlp, data)
    assert not bare.gradients
    assert full.gradients.keys() == {"0", "2"}
    torch.testing.assert_close(bare.moments("2").products, full.moments("2").products)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_give_the_same_statistics_up_to_rounding(mlp, data, dtype):
    expected = calibrate(mlp, data, loss=None)
    found = calibrate(mlp.to(dtype), [batch.to(dtype) for batch in data], loss=None)
    rounding = 20 * torch.finfo(dtype).eps + 1e-5
    for name in ("0", "2"):
        difference = found.moments(name).products - expected.moments(name).products
        assert difference.norm() <= rounding * expected.moments(name).products.norm()


def test_the_same_seed_gives_the_same_statistics_and_leaves_the_random_state(mlp, data):
    before = torch.get_rng_state()
    first, second, other = (calibrate(mlp, data, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.gradients["2"].products, second.gradients["2"].products)
    assert not torch.equal(first.gradients["2"].products, other.gradients["2"].products)


def state(model: nn.Module) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_model_as_it_was(mlp, data, error):
    mlp.train()
    mlp[0].weight.requires_grad_(False)
    mlp[2].register_forward_hook(lambda *_: None)
    before, calls = state(mlp), []

    def loss(outputs, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise error
        return outputs.mean()

    with pytest.raises(error):
        calibrate(mlp, data, loss=loss)
    assert state(mlp) == before


def test_the_memory_does_not_depend_on_the_number_of_samples(mlp):
    few, many = (calibrate(mlp, [made(8, 64)] * count) for count in (1, 50))
    assert few.bytes == many.bytes


class Reader:
    """A tokenizer of words: ids are their lengths."""

    model_max_length = 8

    def __call__(self, texts, **_):
        ids = [[len(word) for word in text.split()][:8] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def get_vocab(self):
        return {}


def test_strings_are_tokenized_padded_and_masked(tiny_bert):
    stats = calibrate(tiny_bert, ["one two three", "four five"], Reader())
    assert stats.tokens == 5
    single = calibrate(tiny_bert, ["one two three"], Reader()) + calibrate(tiny_bert, ["four five"], Reader())
    name = "encoder.layer.1.output.dense"
    torch.testing.assert_close(
        stats.moments(name).products, single.moments(name).products, rtol=1e-3, atol=1e-3
    )


BAD = {
    "empty": ([], None, "auto", DataError, "no batch"),
    "one-string": ("text", None, "auto", DataError, "list of strings"),
    "strings-without-a-tokenizer": (["text"], None, "auto", DataError, "tokenizer"),
    "not-a-batch": ([3], None, "auto", DataError, "Batch 0 is int"),
    "refused-batch": ([made(2, 64), made(2, 7)], None, "auto", DataError, "Batch 1: Sequential refuses"),
    "nan": ([torch.full((2, 64), float("nan"))], None, "auto", StatsError, "^0: reads NaN"),
    "loss-not-scalar": ([made(2, 64)], None, lambda o, b: o, DataError, r"shape \(2, 64\)"),
    "loss-a-number": ([made(2, 64)], None, lambda o, b: 1.0, DataError, "float"),
    "loss-detached": ([made(2, 64)], None, lambda o, b: o.detach().sum(), DataError, "gradient"),
    "loss-unknown": ([made(2, 64)], None, "mse", DataError, "auto"),
    "loss-array": ([made(2, 64)], None, made(2).numpy(), DataError, "auto"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_where_and_what_to_do(mlp, case):
    data, tokenizer, loss, error, message = BAD[case]
    before = state(mlp)
    with pytest.raises(error, match=message):
        calibrate(mlp, data, tokenizer, loss)
    assert state(mlp) == before


def test_a_tuple_gives_its_first_element_to_the_model_and_all_to_the_loss(mlp):
    batch = (made(4, 64), torch.tensor([1, 2, 3, 0]))
    seen = []

    def loss(outputs, given):
        seen.append(given)
        return nn.functional.cross_entropy(outputs, given[1])

    calibrate(mlp, [batch], loss=loss)
    assert isinstance(seen[0][1], Tensor)


def test_a_layer_that_reads_other_tensors_later_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + self.b(x if len(x) > 2 else x + 1)

    with pytest.raises(StatsError, match="b: shared its input with a"):
        calibrate(Fickle(), [made(3, 4), made(2, 4)])


def test_shrinkage_makes_predictions_from_few_tokens_hold_on_others():
    """40 tokens of 64 independent features look as if they lay in a subspace; the true C is I."""
    model = nn.Sequential(nn.Linear(64, 64))
    few = calibrate(model, [made(10, 64, seed=i) for i in range(4)], loss=None)
    weight, true = model[0].weight.detach(), error_curve(model[0].weight).squared_error(32)
    naive = error_curve(weight, Metric(Gram(few.moments("0").second(centred=True)))).squared_error(32)
    shrunk = error_curve(weight, few.metric("0", "inputs", centred=True)).squared_error(32)
    assert naive < 0.3 * true
    assert shrunk > 0.6 * true
    assert few.held_out_ratio("0") == pytest.approx(1, abs=0.25)


def test_with_many_tokens_the_prediction_holds_without_help():
    model = nn.Sequential(nn.Linear(64, 64))
    many = calibrate(model, [made(1000, 64, seed=i) for i in range(4)], loss=None)
    assert many.held_out_ratio("0") == pytest.approx(1, abs=0.1)


def test_held_out_ratios_see_that_inputs_and_gradients_depend_on_each_other():
    """The loss feels a token only where its inputs are large, which the product of moments cannot know."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            return self.inner(x) * (x.norm(dim=-1, keepdim=True) > 8)

    data = [made(200, 16, seed=i) * torch.tensor([[1.0], [4.0]]).repeat(100, 1) for i in range(8)]
    independent = calibrate(nn.Sequential(nn.Linear(16, 16)), data)
    dependent = calibrate(Gated(), data)
    assert independent.held_out_ratio("0") == pytest.approx(1, abs=0.3)  # of 400 tokens of two scales
    assert dependent.held_out_ratio("inner") > 1.5


def test_held_out_batches_are_part_of_the_statistics_in_the_end(mlp, data):
    stats = calibrate(mlp, data)
    assert stats.tokens == 200
    assert stats.held_out.keys() == {"0", "2"}


def test_strings_of_like_length_are_batched_together_and_none_is_lost():
    texts = ["a b c d e f", "a", "a b c d e", "a b"] * 3
    found = list(batches(texts, Reader(), batch_size=6, by_length=True))
    assert [batch.keywords["input_ids"].shape for batch in found] == [(6, 2), (6, 6)]
    assert sum(batch.tokens for batch in found) == sum(len(text.split()) for text in texts)
    kept = list(batches(texts, Reader(), batch_size=6))
    lengths = [batch.keywords["attention_mask"].sum(1).tolist() for batch in kept]
    assert lengths == [[6, 1, 5, 2, 6, 1], [5, 2, 6, 1, 5, 2]]


def test_weights_made_in_inference_mode_are_refused_and_nothing_is_frozen(data):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 32))
    model.append(nn.Linear(32, 8))
    for loss in ("auto", None):
        with pytest.raises(WeightError, match=r"0\.weight: was made in inference mode, and can neither"):
            calibrate(model, data, loss=loss)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_compressed_model_with_tied_layers_can_be_calibrated_as_far_as_it_is_dense(mlp, data):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    model[1].weight = model[0].weight
    compress(model, rank=4, targets=["0", "1"])
    assert sorted(calibrate(model, data).sources) == ["2"]
    decompress(model)
    assert sorted(calibrate(model, data).sources) == ["0", "1", "2"]


def test_a_model_on_the_meta_device_cannot_run_and_the_error_says_so(mlp, data):
    empty = nn.Sequential(nn.Linear(64, 96, device="meta"), nn.Linear(96, 64, device="meta"))
    small = compress(nn.Sequential(nn.Linear(64, 64)), rank=4)
    calls = {
        "calibrate": lambda: calibrate(empty, data),
        "recover": lambda: lowrank.recover(small, empty, data, steps=1),
        "report": lambda: lowrank.report(small, dense=empty, data=data),
        "benchmark": lambda: lowrank.benchmark(empty, copy.deepcopy(small).to("meta"), data[0]),
        "sequential": lambda: compress(empty, rank=4, sequential=True, data=data),
        "plan": lambda: lowrank.plan(empty, keep=0.5),
        "quantize": lambda: lowrank.quantize(empty),
    }
    for call in calls.values():
        with pytest.raises(WeightError, match="meta device"):
            call()
    with pytest.raises(CheckpointError, match=r"0\.weight: on the meta device, without data"):
        lowrank.save(empty, "never")


def test_layers_without_a_shape_yet_are_refused_by_every_call(data):
    lazy = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64))
    small = compress(nn.Sequential(nn.Linear(64, 64)), rank=4)
    calls = [
        lambda: calibrate(lazy, data),
        lambda: compress(lazy, rank=4),
        lambda: lowrank.plan(lazy, rank=4),
        lambda: lowrank.quantize(lazy),
        lambda: decompress(lazy),
        lambda: lowrank.recover(small, lazy, data, steps=1),
        lambda: lowrank.report(lazy),
        lambda: lowrank.error_curves(lazy),
        lambda: lowrank.save(lazy, "never"),
    ]
    for call in calls:
        with pytest.raises(LowRankError, match=r"0\.weight: has no shape yet.*Call the model on a batch"):
            call()
    lazy(data[0])
    compress(lazy, rank=4)


@pytest.mark.parametrize("number", [torch.tensor(1.0), torch.tensor(1)], ids=["float", "int"])
def test_a_batch_without_dimensions_is_refused(mlp, number):
    with pytest.raises(DataError, match="Batch 0 is a tensor without dimensions"):
        calibrate(mlp, [number] * 4)
    with pytest.raises(DataError, match="data is Tensor"):
        calibrate(mlp, number)
    small = compress(nn.Sequential(nn.Linear(64, 64)), rank=4)
    with pytest.raises(DataError, match=r"dense \(Sequential\) refuses the inputs"):
        lowrank.benchmark(nn.Sequential(nn.Linear(64, 64)), small, number)


def test_numbers_beside_the_input_are_part_of_a_batch(data):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, scale, x):
            return self.layer(x) * scale

    model = Scaled()
    assert calibrate(model, [{"scale": torch.tensor(2), "x": x} for x in data]).tokens == 200

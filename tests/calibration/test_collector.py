"""Calibration against slow oracles: sums over all tokens at once, and gradients taken one by one."""

import pytest
import torch
from closeness import CANCELLED32
from random_tensors import gaussian, summed
from torch import Tensor, nn

import lowrank
from lowrank import (
    DataError,
    StatsError,
    WeightError,
    calibrate,
    compress,
)
from lowrank.calibration.data import batches


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
            masked.moments(name).products, plain.moments(name).products, rtol=CANCELLED32, atol=CANCELLED32
        )
    for name in plain.gradients:
        torch.testing.assert_close(
            masked.gradients[name].products,
            plain.gradients[name].products,
            rtol=CANCELLED32,
            atol=CANCELLED32,
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


def test_the_memory_does_not_depend_on_the_number_of_samples(mlp):
    few, many = (calibrate(mlp, [gaussian(8, 64)] * count) for count in (1, 50))
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
        stats.moments(name).products, single.moments(name).products, rtol=CANCELLED32, atol=CANCELLED32
    )


def test_a_tuple_gives_its_first_element_to_the_model_and_all_to_the_loss(mlp):
    batch = (gaussian(4, 64), torch.tensor([1, 2, 3, 0]))
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
        calibrate(Fickle(), [gaussian(3, 4), gaussian(2, 4)])


def test_strings_of_like_length_are_batched_together_and_none_is_lost():
    texts = ["a b c d e f", "a", "a b c d e", "a b"] * 24
    found = list(batches(texts, Reader(), batch_size=6, by_length=True))
    shapes = [tuple(batch.keywords["input_ids"].shape) for batch in found]
    assert shapes == [(6, n) for n in (1, 2, 5, 6) for _ in range(4)]
    assert sum(batch.tokens for batch in found) == sum(len(text.split()) for text in texts)
    texts = texts[:12]
    kept = list(batches(texts, Reader(), batch_size=6))
    lengths = [batch.keywords["attention_mask"].sum(1).tolist() for batch in kept]
    assert lengths == [[6, 1, 5, 2, 6, 1], [5, 2, 6, 1, 5, 2]]


def test_few_strings_make_several_batches_with_strings_of_all_lengths():
    texts = ["a b c d e f", "a", "a b c d e", "a b"] * 2
    found = list(batches(texts, Reader(), by_length=True))
    assert [batch.keywords["attention_mask"].sum(1).tolist() for batch in found] == [
        [1, 5],
        [1, 5],
        [2, 6],
        [2, 6],
    ]
    assert len(list(batches(texts[:3], Reader(), by_length=True))) == 3


def test_weights_made_in_inference_mode_are_refused_and_nothing_is_frozen(data):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 32))
    model.append(nn.Linear(32, 8))
    for loss in ("auto", None):
        with pytest.raises(WeightError, match=r"0\.weight: was made in inference mode, and can neither"):
            calibrate(model, data, loss=loss)
    assert all(parameter.requires_grad for parameter in model.parameters())


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

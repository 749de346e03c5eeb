"""Evaluation functions against what can be computed by hand."""

import copy
import itertools
import math

import pytest
import torch
from closeness import CANCELLED32, FEW32, LAYERS32, SUMS32
from torch import nn

from lowrank import DataError, LowRankError, apply, calibrate, compress, plan, report
from lowrank.calibration.data import windows
from lowrank.reports.evaluation import (
    accuracy,
    embed,
    embedding_cosine,
    loss_increase,
    perplexity,
    spearman,
    sts_spearman,
)


class Words:
    """A tokenizer of words: ids are their lengths."""

    model_max_length = 8

    def __call__(self, texts, **_):
        texts = [texts] if isinstance(texts, str) else texts
        ids = [[len(word) for word in text.split()][:8] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


@pytest.fixture
def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64))


TEXTS = ["one two three", "a", "four five six seven", "eleven twelve"]


def test_embeddings_are_the_normalised_mean_over_real_tokens_in_the_order_of_the_texts(tiny_bert):
    found = embed(tiny_bert, TEXTS, Words(), batch_size=3)
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([[len(word) for word in text.split()]])
        with torch.no_grad():
            hidden = tiny_bert(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, nn.functional.normalize(hidden, dim=0), rtol=LAYERS32, atol=SUMS32)


def test_a_model_has_cosine_one_to_itself_and_less_to_a_compressed_one(tiny_bert):
    assert embedding_cosine(tiny_bert, tiny_bert, TEXTS, Words()) == pytest.approx(1, abs=SUMS32)
    small = compress(copy.deepcopy(tiny_bert), rank=1)
    assert embedding_cosine(small, tiny_bert, TEXTS, Words()) < 1 - 1e-4


def test_spearman_is_the_correlation_of_ranks_and_ties_share_theirs():
    first = torch.tensor([1.0, 2.0, 2.0, 9.0], dtype=torch.float64)
    assert spearman(first, first.exp()) == pytest.approx(1)
    assert spearman(first, -first) == pytest.approx(-1)
    ranks, other = torch.tensor([1.0, 2.5, 2.5, 4.0]), torch.tensor([2.0, 1.0, 3.0, 4.0])
    expected = float(torch.corrcoef(torch.stack([ranks, other]))[0, 1])
    assert spearman(first, other.double()) == pytest.approx(expected, abs=FEW32)


def test_sts_correlates_the_cosines_of_pairs_with_scores(tiny_bert):
    pairs = list(itertools.pairwise(TEXTS))
    vectors = embed(tiny_bert, TEXTS, Words())
    cosines = (vectors[:-1] * vectors[1:]).sum(-1)
    assert sts_spearman(tiny_bert, pairs, cosines.tolist(), Words()) == pytest.approx(1)
    assert sts_spearman(tiny_bert, pairs, (-cosines).tolist(), Words()) == pytest.approx(-1)


def test_perplexity_is_that_of_the_models_own_loss(tiny_gpt2):
    ids = torch.randint(50, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [float(tiny_gpt2.eval()(input_ids=w[None], labels=w[None]).loss) for w in ids.view(5, 8)]
    tiny_gpt2.train()
    assert perplexity(tiny_gpt2, ids, window=8) == pytest.approx(math.exp(sum(losses) / 5), rel=SUMS32)
    assert perplexity(tiny_gpt2, ids, window=8, count=2) == pytest.approx(
        math.exp(sum(losses[:2]) / 2), rel=SUMS32
    )
    assert tiny_gpt2.training


def test_accuracy_counts_the_largest_logit():
    class Constant(nn.Module):
        def forward(self, input_ids, attention_mask):
            return {"logits": torch.tensor([[0.0, 1.0]]).expand(len(input_ids), 2)}

    assert accuracy(Constant(), TEXTS, [1, 1, 0, 1], Words(), batch_size=3) == 0.75


def test_windows_cut_the_text_and_drop_the_rest():
    assert windows(torch.arange(10), tokens=4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("two words", "tokenizer"), (torch.arange(3), "do not make a window")],
    ids=["str", "short"],
)
def test_texts_without_tokenizer_or_length_are_refused(tiny_gpt2, text, message):
    with pytest.raises(DataError, match=message):
        perplexity(tiny_gpt2, text, window=8)


def test_more_windows_than_there_are_is_refused(tiny_gpt2):
    with pytest.raises(DataError, match="has 2 windows"):
        perplexity(tiny_gpt2, torch.arange(16), window=8, count=3)


def test_labels_must_be_as_many_as_texts():
    class Constant(nn.Module):
        def forward(self, input_ids, attention_mask):
            return {"logits": torch.zeros(len(input_ids), 2)}

    with pytest.raises(DataError, match="4 texts"):
        accuracy(Constant(), TEXTS, [0, 0, 0, 0, 0], Words())


def test_an_empty_text_is_refused(tiny_bert):
    with pytest.raises(DataError, match="empty"):
        embed(tiny_bert, ["one", ""], Words())


def test_the_loss_increase_is_the_divergence_from_the_dense_models_predictions(tiny_gpt2):
    small = compress(copy.deepcopy(tiny_gpt2).eval(), rank=4)
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = tiny_gpt2.eval()(input_ids=ids).logits.double().softmax(-1)
        q = small(input_ids=ids).logits.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert loss_increase(small, tiny_gpt2, [{"input_ids": ids}]) == pytest.approx(expected, rel=CANCELLED32)


def test_a_small_loss_increase_is_about_what_the_plan_predicts(tiny_bert):
    """To second order: at a high rank the prediction holds on the data that it was made from."""
    data = [
        {"input_ids": torch.randint(99, (16, 8), generator=torch.Generator().manual_seed(i))}
        for i in range(40)
    ]
    stats = calibrate(tiny_bert, data)
    decided = plan(tiny_bert, keep=0.9, stats=stats, allocation="uniform")
    small = apply(copy.deepcopy(tiny_bert), decided, stats)
    measured = report(small, dense=tiny_bert, data=data)
    assert measured.loss_increase_predicted == pytest.approx(decided.loss_increase)
    ratio = measured.loss_increase_measured / measured.loss_increase_predicted
    assert 0.5 < ratio < 2
    assert "loss increase" in str(measured)


def test_a_report_measures_with_both_the_dense_model_and_data(tiny_bert):
    with pytest.raises(LowRankError, match="both"):
        report(tiny_bert, dense=tiny_bert)


def test_an_added_bias_is_not_counted_as_having_been_there():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    dense = report(model)
    data = [torch.randn(40, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    small = report(compress(model, rank=8, data=data, add_bias=True))
    assert small.parameters_before == dense.parameters
    assert small.parameters == 2 * (8 * 128 + 64)


def test_an_encoder_has_no_perplexity_and_the_message_says_what_has(tiny_bert):
    with pytest.raises(DataError, match="BertModel returns no logits"):
        perplexity(tiny_bert, torch.arange(16), window=8)


# --- results that are no number


@pytest.mark.parametrize(
    ("scores", "pairs", "message"),
    [
        (
            [3.0, 3.0],
            [TEXTS[:2], TEXTS[2:]],
            "scores: all 2 values are equal, so there is no rank correlation",
        ),
        ([1.0], [TEXTS[:2]], "cosines: all 1 values are equal"),
        ([1.0, 2.0], [TEXTS[:2], TEXTS[:2]], "cosines: all 2 values are equal"),
        ([1.0, math.nan], [TEXTS[:2], TEXTS[2:]], r"scores\[1\]=nan"),
        ([1.0, math.inf], [TEXTS[:2], TEXTS[2:]], r"scores\[1\]=inf"),
    ],
    ids=["equal-scores", "one-pair", "equal-pairs", "nan", "inf"],
)
def test_a_rank_correlation_that_does_not_exist_is_refused(tiny_bert, scores, pairs, message):
    with pytest.raises(DataError, match=message):
        sts_spearman(tiny_bert, pairs, scores, Words())


def test_spearman_of_values_without_ranks_is_refused():
    line = torch.arange(3.0)
    for values, message in ((torch.ones(3), "second: all 3 values"), (line / 0, "second: has NaN")):
        with pytest.raises(DataError, match=message):
            spearman(line, values)


def test_a_model_whose_outputs_are_not_finite_is_not_measured(tiny_bert, tiny_gpt2):
    broken = copy.deepcopy(tiny_bert)
    broken.encoder.layer[1].output.LayerNorm.weight.data[3] = math.nan
    for call in (
        lambda: embed(broken, TEXTS, Words()),
        lambda: embedding_cosine(broken, tiny_bert, TEXTS, Words()),
        lambda: embedding_cosine(tiny_bert, broken, TEXTS, Words()),
        lambda: sts_spearman(broken, [TEXTS[:2], TEXTS[2:]], [1.0, 2.0], Words()),
        lambda: loss_increase(broken, tiny_bert, TEXTS, Words()),
    ):
        with pytest.raises(DataError, match="Batch 0: BertModel returns NaN or infinite values"):
            call()
    ids = torch.randint(50, (16,), generator=torch.Generator().manual_seed(0))
    tiny_gpt2.transformer.ln_f.weight.data *= 1e6
    with pytest.raises(LowRankError, match=r"The mean loss is .* beyond the largest number"):
        perplexity(tiny_gpt2, ids, window=8)
    tiny_gpt2.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(DataError, match="Batch 0: GPT2LMHeadModel returns NaN"):
        perplexity(tiny_gpt2, ids, window=8)


def test_a_label_that_is_no_class_of_the_model_is_refused():
    class Constant(nn.Module):
        def forward(self, input_ids, attention_mask):
            return {"logits": torch.zeros(len(input_ids), 2)}

    with pytest.raises(DataError, match="The label 2 is none of the model's 2 classes"):
        accuracy(Constant(), TEXTS, [0, 1, 2, 0], Words())

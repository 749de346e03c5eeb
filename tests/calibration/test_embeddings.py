"""How often rows are read, and what a table's error costs."""

import copy
import json

import pytest
import torch
from closeness import LAYERS32
from saved_models import built
from tied_tables import FAMILIES, IDS, ROWS, batches_of, llama

import lowrank
from lowrank import (
    Stats,
    compress,
)
from lowrank.calibration.embeddings import EmbeddingStatistics, nearest_product
from lowrank.reports.evaluation import loss_increase


def test_calibration_counts_the_real_tokens(tiny_bert):
    mask = torch.ones_like(IDS)
    mask[:, 20:] = 0
    stats = lowrank.calibrate(
        tiny_bert, [{"input_ids": IDS, "attention_mask": mask}], targets=["*", "*.word_embeddings"]
    )
    counted = stats.embeddings["embeddings.word_embeddings"].counts
    assert torch.equal(counted, torch.bincount(IDS[:, :20].flatten(), minlength=ROWS).double())


def test_statistics_of_tables_add_up_and_survive_the_disk(tmp_path):
    model, every = built(llama), batches_of(6)
    ask = {"targets": ["*", "*embed_tokens"], "loss": lambda outputs, batch: outputs.logits.square().mean()}
    whole = lowrank.calibrate(model, every, **ask)
    parts = lowrank.calibrate(model, every[:2], **ask) + lowrank.calibrate(model, every[2:], **ask)
    parts.save(tmp_path / "stats")
    for other in (parts, Stats.load(tmp_path / "stats")):
        for name, sums in whole.embeddings["model.embed_tokens"].tensors.items():
            torch.testing.assert_close(
                getattr(other.embeddings["model.embed_tokens"], name), sums, rtol=LAYERS32, atol=0
            )
        assert other.embeddings["model.embed_tokens"].head_tokens == 6 * 96
    with pytest.raises(lowrank.StatsError, match="know different layers"):
        whole + lowrank.calibrate(model, every, targets=ask["targets"], loss=None)


def test_statistics_of_an_older_version_are_refused_with_what_to_do(tiny_bert, tmp_path):
    lowrank.calibrate(tiny_bert, batches_of(2), loss=None).save(tmp_path / "stats")
    file = tmp_path / "stats" / "stats.json"
    structure = json.loads(file.read_text())
    file.write_text(json.dumps(structure | {"format": structure["format"] - 1}))
    with pytest.raises(lowrank.StatsError, match=r"of an older lowrank.*Make it anew"):
        Stats.load(tmp_path / "stats")


def test_a_table_that_was_not_calibrated_stays_with_a_reason(tiny_bert):
    stats = lowrank.calibrate(tiny_bert, batches_of(2), loss=None, targets=["*"])
    plan = lowrank.plan(tiny_bert, keep=0.5, stats=stats, targets=["*", "*.word_embeddings"])
    assert plan["embeddings.word_embeddings"].rank is None
    assert "not among those that were calibrated" in plan["embeddings.word_embeddings"].reason


def test_rows_weigh_as_often_as_they_are_read(tiny_bert):
    """Against the truncated SVD of the rows, each scaled by the root of its frequency."""
    stats = lowrank.calibrate(tiny_bert, batches_of(4), loss=None, targets=["*.word_embeddings"])
    table = "embeddings.word_embeddings"
    weight = tiny_bert.embeddings.word_embeddings.weight.detach().double()
    plan = lowrank.plan(tiny_bert, rank=16, stats=stats, targets=[table])
    frequencies = stats.embeddings[table].frequencies
    small = compress(copy.deepcopy(tiny_bert), rank=16, stats=stats, targets=[table])
    lost = weight - small.embeddings.word_embeddings.dense_weight().detach().double()
    centred = weight - tiny_bert.embeddings.word_embeddings.weight.new_zeros(1)
    values = torch.linalg.svdvals(frequencies.sqrt()[:, None] * centred)
    exact = values[16:].square().sum().sqrt()
    assert plan[table].added_bias is False  # its padding row is zero
    assert (frequencies.sqrt()[:, None] * lost).norm() == pytest.approx(float(exact), rel=1e-4)
    plain = compress(copy.deepcopy(tiny_bert), rank=16, targets=[table])
    other = weight - plain.embeddings.word_embeddings.dense_weight().detach().double()
    assert exact < 0.9 * (frequencies.sqrt()[:, None] * other).norm()


def test_a_row_that_was_never_read_still_counts():
    counts = torch.tensor([10.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    frequencies = EmbeddingStatistics(counts).frequencies
    assert float(frequencies.sum()) == pytest.approx(1)
    assert bool((frequencies > 0).all())
    assert bool((frequencies[:-1] >= frequencies[1:]).all())
    assert 0 < EmbeddingStatistics(torch.ones(5, dtype=torch.float64)).pseudo_count <= 1


@pytest.mark.parametrize("name", ["untied", "llama", "bert"])
def test_the_predicted_increase_of_the_loss_is_that_of_small_changes(name, tiny_bert):
    """Averaged over random changes of the embedding, which follow neither tokens nor gradients.

    No token comes twice in a sample: gradients of its places add up, and are taken for independent.
    """
    model, table = tiny_bert, "embeddings.word_embeddings"
    if name != "untied":
        model, table = built(FAMILIES[name][0]), FAMILIES[name][1]
    generator = torch.Generator().manual_seed(1)
    data = [
        {"input_ids": torch.stack([torch.randperm(90, generator=generator)[:24] for _ in range(8)])}
        for _ in range(16)
    ]
    stats = lowrank.calibrate(model, data, targets=[table])
    metric = stats.metric(table, "loss", centred=False)
    measured = predicted = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        moved = copy.deepcopy(model)
        change = 1e-3 * torch.randn(ROWS, 64, generator=generator)
        with torch.no_grad():
            moved.get_submodule(table).weight += change
        measured += loss_increase(moved, model, data)
        weighed = metric.inputs.times_root(metric.outputs.enter(change.double()))
        predicted += stats.loss_per_square(table) * float(weighed.square().sum())
    assert measured / predicted == pytest.approx(1, abs=0.3)


def test_the_nearest_product_is_the_one_of_the_svd():
    generator = torch.Generator().manual_seed(0)
    terms = []
    for _ in range(2):
        half = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        terms.append((torch.rand(7, generator=generator, dtype=torch.float64), half @ half.T))
    weights, matrix = nearest_product(terms)
    whole = sum(torch.outer(vector, moment.flatten()) for vector, moment in terms)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(
        torch.outer(weights, matrix.flatten()), values[0] * torch.outer(left[:, 0], right[0])
    )
    assert bool((weights >= 0).all())
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-12

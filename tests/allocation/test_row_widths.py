"""Bits for the components of an embedding: chosen, stored, loaded, priced, refused when damaged."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import CheckpointError, LowRankEmbedding, LowRankError
from lowrank.allocation.row_widths import row_width_losses
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft
from lowrank.surgery.factorization import matrix_of, metric_of

ROWS, WIDTH = 2000, 96
SIZES = {"hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
IDS = torch.randint(ROWS, (64, 32), generator=torch.Generator().manual_seed(0))
BUDGET = 200_000
BATCHES = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(4)]


def with_decaying_rows(model: nn.Module, table: str) -> nn.Module:
    """Give the embedding components of unlike size, as trained ones have them."""
    with torch.no_grad():
        model.get_submodule(table).weight.mul_(30 * torch.logspace(0, -1.5, WIDTH))
    return model


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=ROWS, max_position_embeddings=64)
    model = transformers.BertModel(config).eval()
    return with_decaying_rows(model, "embeddings.word_embeddings")


@pytest.fixture(scope="module")
def stats(bert):
    return lowrank.calibrate(bert, BATCHES)


@pytest.fixture
def small(bert, stats):
    return lowrank.compress(copy.deepcopy(bert), max_bytes=BUDGET, quantize="auto", stats=stats)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def test_the_solver_gives_wide_components_more_bits(small):
    table = small.embeddings.word_embeddings
    assert isinstance(table, LowRankEmbedding)
    widths = [int(width) for width in table.down.scheme.name.removeprefix("bits")]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert table.up.scheme.name == "int8"


def test_the_budget_holds_and_the_report_counts_what_is_stored(small, tmp_path):
    folder = lowrank.save(small, tmp_path / "small")
    told = lowrank.report(small)
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) <= BUDGET
    assert told.checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert any(weight.scheme.startswith("bits") for weight in told.quantized)


@pytest.mark.parametrize("front_door", ["from_pretrained", "load"])
def test_a_reloaded_model_gives_the_same_bits(small, front_door, tmp_path):
    folder = lowrank.save(small, tmp_path / "small")
    if front_door == "from_pretrained":
        again = transformers.AutoModel.from_pretrained(folder)
    else:
        lowrank.save(nn.ModuleDict({"encoder": small}), tmp_path / "inside")
        again = lowrank.load(
            tmp_path / "inside", nn.ModuleDict({"encoder": transformers.BertModel(small.config)})
        )["encoder"].eval()
    assert torch.equal(outputs(again), outputs(small))


def test_what_is_predicted_is_what_is_lost(bert, stats):
    """The prediction is made on rows drawn by their frequency: at 8,192 draws it is good to some percent."""
    drafted = draft(Inspection(bert), ["*word_embeddings"])
    layer = drafted["embeddings.word_embeddings"]
    metric = metric_of(layer, "loss", stats)
    exact = matrix_of(bert.embeddings.word_embeddings, layer, metric)
    offers = row_width_losses(bert.embeddings.word_embeddings, layer, metric)
    assert len(offers) > 10
    for storage_format, predicted in list(offers.items())[::5]:
        rank = storage_format.only_rank
        planned = replace(drafted, metric="loss").with_layers({layer.name: replace(layer, rank=rank)})
        planned = replace(planned, quantized=tuple(storage_format.quantized(planned[layer.name])))
        table = lowrank.apply(copy.deepcopy(bert), planned, stats=stats).embeddings.word_embeddings
        captured = metric.squared_norm(exact) - metric.squared_norm(exact - best_of_rank(exact, rank, metric))
        lost = metric.squared_norm(table.dense_weight() - bert.embeddings.word_embeddings.weight.detach())
        tail = metric.squared_norm(exact) - captured
        assert (lost - tail) / captured == pytest.approx(predicted.factors, rel=0.25, abs=2e-4)


def best_of_rank(matrix, rank, metric):
    factors = lowrank.linalg.truncated_svd(matrix, rank, metric)
    return factors.left @ factors.right


def test_a_table_that_a_head_multiplies_by_has_widths_that_kernels_know():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=ROWS, tie_word_embeddings=True)
    model = with_decaying_rows(transformers.LlamaForCausalLM(config).eval(), "model.embed_tokens")
    stats = lowrank.calibrate(model, [{"input_ids": part} for part in IDS.split(8)])
    plan = lowrank.plan(model, max_bytes=400_000, quantize="auto", stats=stats)
    assert {weight.scheme for weight in plan.quantized} <= {"int8", "int4"}


def test_decompressing_gives_the_rows_that_were_looked_up(small):
    rows = small.embeddings.word_embeddings(torch.arange(ROWS)).detach()
    dense = lowrank.decompress(small).embeddings.word_embeddings
    # The factor in int8 rounds what it reads, to one part in 254 of a row's largest element.
    torch.testing.assert_close(dense.weight.detach(), rows, rtol=0, atol=0.03 * float(rows.abs().max()))


def test_exported_programs_look_up_the_same_rows(small):
    table = small.embeddings.word_embeddings.down
    exported = torch.export.export(table, (IDS[:2],)).module()
    assert torch.equal(exported(IDS[:2]), table(IDS[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes[:, :-4].contiguous(), "has shape"),
        (lambda codes: codes.to(torch.int32), "must be U8"),
    ],
    ids=["too few bits", "dtype"],
)
def test_damaged_codes_are_refused(small, change, message, tmp_path):
    folder = tmp_path / "small"
    small.save_pretrained(folder)  # without digests, which would find any change
    tensors = load_file(folder / "model.safetensors")
    name = "embeddings.word_embeddings.down.codes"
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModel.from_pretrained(folder)


def test_a_rank_that_the_widths_do_not_fit_is_refused(bert, stats):
    plan = lowrank.plan(bert, max_bytes=BUDGET, quantize="auto", stats=stats)
    quantized = (
        replace(weight, scheme="bits43") if weight.name.endswith("word_embeddings.down") else weight
        for weight in plan.quantized
    )
    with pytest.raises(LowRankError, match="bits43 is for rows of 64 elements, not 96"):
        lowrank.apply(copy.deepcopy(bert), replace(plan, quantized=tuple(quantized)), stats=stats)

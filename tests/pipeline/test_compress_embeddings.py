"""Embeddings with the heads that are tied to them, from a model to a checkpoint and back."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import lowrank
from lowrank import (
    CheckpointError,
    LowRankEmbedding,
    LowRankError,
    Plan,
    QuantizedEmbedding,
    Stats,
    compress,
    quantize,
    report,
)
from lowrank.allocation.quantization_losses import quantization_losses_of
from lowrank.calibration.embeddings import EmbeddingStatistics, nearest_product
from lowrank.errors import BudgetError, PlanError, TargetError
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft
from lowrank.linalg import truncated_svd
from lowrank.nn import TiedLinear
from lowrank.plans.storage_formats import FLOAT, storage_formats_of
from lowrank.reports.evaluation import loss_increase

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ROWS = 99
IDS = torch.arange(96).reshape(4, 24) % ROWS


def masked_lm() -> nn.Module:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=ROWS))
    with torch.no_grad():
        model.cls.predictions.bias.normal_()  # which is tied to that of the head
    return model


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=ROWS, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=95
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=ROWS, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


FAMILIES = {
    "bert": (masked_lm, "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "llama": (llama, "model.embed_tokens", "lm_head"),
    "gpt2": (gpt2, "transformer.wte", "lm_head"),
}
every_family = pytest.mark.parametrize(("build", "table", "head"), FAMILIES.values(), ids=FAMILIES.keys())
HOW = ("factors", "int8", "int4", "factors+int8", "factors+int4")
every_way = pytest.mark.parametrize("how", HOW)


def built(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def made_small(model: nn.Module, table: str, how: str) -> nn.Module:
    if not how.startswith("factors"):
        return quantize(model, how)
    return compress(model, rank=32, targets=["*", table], quantize=how.partition("+")[2] or None)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def are_one(model: nn.Module, table: str, head: str) -> bool:
    found = model.get_submodule(head)
    return isinstance(found, TiedLinear) and found.owner is model.get_submodule(table)


def batches_of(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Token ids of which small ones are far more frequent, and ids from 90 on never come."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": (90 * torch.rand(4, 24, generator=generator) ** 3).long()} for _ in range(count)]


# What becomes a target


def test_tables_are_listed_only_where_a_target_spells_them(tiny_bert):
    table = "embeddings.word_embeddings"
    assert table not in lowrank.plan(tiny_bert, keep=0.5)
    assert table not in lowrank.plan(tiny_bert, keep=0.5, targets=["*"])
    for pattern in (table, "*.word_embeddings", "*embed*", "*word_embed*"):
        assert lowrank.plan(tiny_bert, rank=16, targets=[pattern])[table].rank == 16, pattern
    both = lowrank.plan(tiny_bert, keep=0.5, targets=["*", "*.word_embeddings"])
    assert [x.name for x in both if x.is_embedding] == [table]
    assert len(both) == len(lowrank.plan(tiny_bert, keep=0.5)) + 1


@every_family
def test_the_head_has_the_rank_of_its_table_and_no_parameters(build, table, head):
    plan = lowrank.plan(built(build), rank=16, targets=[table])
    assert (plan[head].rank, plan[head].tied_to, plan[head].parameters) == (16, table, 0)
    assert plan.kept_fraction == 16 * (ROWS + 64) / (ROWS * 64)  # the tied weight counts once
    assert f"uses the weight of {table}" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


@every_family
def test_naming_the_head_names_the_table(build, table, head):
    model = built(build)
    assert lowrank.plan(model, rank=16, targets=[head]) == lowrank.plan(model, rank=16, targets=[table])


@every_family
def test_a_head_that_is_ignored_keeps_its_table(build, table, head):
    plan = lowrank.plan(built(build), rank=16, targets=["*", f"*{table}"], ignore=[head])
    assert plan[head].rank is None
    assert plan[table].rank is None
    assert plan[table].reason == f"is tied to {head}, which is ignored"


def test_a_table_that_must_stay_is_an_error_where_it_is_named():
    model = nn.Sequential(nn.Embedding(50, 32, max_norm=1.0), nn.Linear(32, 32))
    with pytest.raises(TargetError, match=r"the embedding 0 cannot be factorized: it has a max_norm"):
        lowrank.plan(model, rank=4, targets=["0"])
    t5 = transformers.T5Config(vocab_size=ROWS, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    with pytest.raises(TargetError, match=r"the embedding shared cannot be factorized: it shares its weight"):
        lowrank.plan(transformers.T5ForConditionalGeneration(t5), rank=8, targets=["shared"])


def test_editing_the_table_edits_the_head():
    model = built(llama)
    plan = lowrank.plan(model, rank=16, targets=["*", "*embed_tokens"])
    edited = plan.with_rank("*embed_tokens", 8)
    assert (edited["lm_head"].rank, edited["lm_head"].tied_to) == (8, "model.embed_tokens")
    assert edited.with_rank("*", None)["lm_head"].tied_to == "model.embed_tokens"
    with pytest.raises(TargetError, match=r"lm_head: has the rank of model\.embed_tokens"):
        plan.with_rank("lm_head", 8)


def test_a_plan_that_forgets_the_head_is_refused():
    model = built(llama)
    plan = lowrank.plan(model, rank=16, targets=["*embed_tokens"])
    lonely = Plan.from_dict({**plan.to_dict(), "layers": [plan.to_dict()["layers"][0]]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=r"changes this embedding, but not lm_head, which is tied to it"):
        lowrank.apply(model, lonely)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_a_table_has_no_latency_to_choose_by(tiny_bert):
    with pytest.raises(BudgetError, match=r"word_embeddings: an embedding is looked up, not multiplied"):
        lowrank.plan(tiny_bert, speedup=1.5, inputs=IDS, targets=["*.word_embeddings"])


# Round trips


@every_way
@every_family
def test_a_checkpoint_gives_the_same_bits_in_every_way(build, table, head, how, tmp_path):
    small = made_small(built(build), table, how)
    expected = logits(small)
    small.save_pretrained(tmp_path / "one")
    again = type(small).from_pretrained(tmp_path / "one").eval()
    again.save_pretrained(tmp_path / "two")
    lowrank.save(small, tmp_path / "three")
    for loaded in (
        again,
        type(small).from_pretrained(tmp_path / "two").eval(),
        lowrank.load(tmp_path / "three"),
    ):
        assert torch.equal(logits(loaded.eval()), expected)
        assert are_one(loaded, table, head)
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert size == report(small).checkpoint_bytes
    base = transformers.AutoModel.from_pretrained(tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, small.base_model(IDS).last_hidden_state)


@every_way
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_checkpoint_gets_a_tied_head(name, how, tmp_path):
    build, table, head = FAMILIES[name]
    small = made_small(built(build), table, how)
    small.base_model.save_pretrained(tmp_path)
    whole = type(small).from_pretrained(tmp_path).eval()
    assert are_one(whole, table, head)
    assert torch.equal(logits(whole), logits(small))


@every_way
@every_family
def test_the_tie_survives_copies_and_tie_weights(build, table, head, how):
    small = made_small(built(build), table, how)
    expected = logits(small)
    twin = copy.deepcopy(small)
    for model in (small, twin):
        model.tie_weights()
        assert are_one(model, table, head)
        assert torch.equal(logits(model), expected)
    assert twin.get_submodule(table) is not small.get_submodule(table)


@every_way
@every_family
def test_decompress_gives_the_tie_back(build, table, head, how):
    dense = built(build)
    small = made_small(copy.deepcopy(dense), table, how)
    expected = logits(small)
    ties = dense._tied_weights_keys, dense.all_tied_weights_keys
    lowrank.decompress(small)
    assert type(small.get_submodule(table)) is nn.Embedding
    assert type(small.get_submodule(head)) is nn.Linear
    assert small.get_submodule(head).weight is small.get_submodule(table).weight
    assert (small._tied_weights_keys, small.all_tied_weights_keys) == ties
    assert (logits(small) - expected).norm() < 0.02 * expected.norm()
    small.resize_token_embeddings(107)
    assert small.get_submodule(head).weight is small.get_submodule(table).weight
    assert small.get_submodule(head).out_features == 107


@every_family
def test_training_moves_both(build, table, head, tmp_path):
    small = made_small(built(build), table, "factors")
    before = logits(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert are_one(small, table, head)
    assert not torch.equal(logits(small), before)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(type(small).from_pretrained(tmp_path).eval()), logits(small))


@every_family
@pytest.mark.parametrize("how", ["factors", "int8"])
def test_resizing_says_what_to_do(build, table, head, how):
    small = made_small(built(build), table, how)
    with pytest.raises(LowRankError, match=r"Call lowrank\.decompress\(model\) first, resize"):
        small.resize_token_embeddings(120)
    with pytest.raises(LowRankError, match=r"Call lowrank\.decompress\(model\) first, resize"):
        small.base_model.resize_token_embeddings(120)


@every_way
def test_any_other_model_is_saved_and_loaded(how, tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, 64, padding_idx=0), nn.Linear(64, 64), nn.Linear(64, ROWS))
        model[2].weight = model[0].weight
        return model

    small = fresh()
    small = compress(small, rank=32, targets=["0"]) if how.startswith("factors") else small
    small = quantize(small, how.rpartition("+")[2]) if how != "factors" else small
    expected = small(IDS)
    folder = lowrank.save(small, tmp_path / "small")
    loaded = lowrank.load(folder, model=fresh())
    assert torch.equal(loaded(IDS), expected)
    assert are_one(loaded, "0", "2")
    stored = report(small).checkpoint_bytes
    assert (folder / "model.safetensors").stat().st_size == stored


def test_a_head_alone_cannot_be_saved(tmp_path):
    small = made_small(built(masked_lm), "bert.embeddings.word_embeddings", "factors")
    with pytest.raises(LowRankError, match=r"predictions\.decoder: uses the weight of a module outside"):
        lowrank.save(small.cls, tmp_path / "head")
    with pytest.raises(LowRankError, match=r"predictions\.decoder: uses the weight of a module outside"):
        lowrank.decompress(small.cls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tied_to": "model.layers.0.mlp.up_proj"}, "which has another shape: 128 rows of 64"),
        ({"tied_to": "model.norm"}, "which is no embedding or linear layer here"),
        ({"tied_to": "nowhere"}, "which is no embedding or linear layer here"),
        ({"in_features": 32}, "the model's is"),
    ],
    ids=["a-layer", "a-norm", "nothing", "another-shape"],
)
def test_a_tie_that_was_changed_is_refused(change, message, tmp_path):
    small = made_small(built(llama), "model.embed_tokens", "factors")
    small.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    (entry,) = [x for x in config["quantization_config"]["plan"]["layers"] if x["name"] == "lm_head"]
    entry.update(change)
    if "tied_to" in change:
        config["tie_word_embeddings"] = False  # else the class says what it is tied to
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        type(small).from_pretrained(tmp_path)


# What is counted


def test_the_report_counts_the_table_once():
    dense = built(llama)
    small = made_small(copy.deepcopy(dense), "model.embed_tokens", "factors")
    told, before = report(small), report(dense)
    assert told.parameters_before == before.parameters
    assert told.parameters == sum(p.numel() for p in small.parameters())
    rows = {layer.name: layer for layer in told.layers}
    assert rows["model.embed_tokens"].parameters == 32 * (ROWS + 64)
    assert (rows["lm_head"].parameters, rows["lm_head"].bytes) == (0, 0)
    assert rows["lm_head"].macs == 32 * (ROWS + 64)
    assert rows["model.embed_tokens"].macs == 32 * 64
    assert "embeddings" in str(told)
    assert told.checkpoint_bytes_before == pytest.approx(before.checkpoint_bytes, rel=0.01)


def test_a_budget_of_bytes_holds_for_the_whole_file():
    dense = built(llama)
    limit = sum(p.numel() * 4 for p in dense.parameters()) * 6 // 10
    small = compress(dense, max_bytes=limit, targets=["*", "*embed_tokens"])
    assert isinstance(small.model.embed_tokens, LowRankEmbedding)
    assert sum(p.numel() * 4 for p in small.parameters()) <= limit


def test_a_padding_row_of_zeros_stays_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, 64, padding_idx=5), nn.Linear(64, 8))
    small = compress(model, rank=16, targets=["0"])
    assert small[0].bias is None
    assert not bool(small[0](torch.tensor([5])).any())
    quantize(small)
    assert not bool(small[0](torch.tensor([5])).any())


def test_other_tables_are_centred():
    """One rank more would be needed for the mean row else, whatever the embedding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, 64), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight += 5 * torch.randn(64)
    weight = model[0].weight.detach().clone()
    small = compress(model, rank=16, targets=["0"])
    lost = (small[0].dense_weight() - weight).norm()
    plain = truncated_svd(weight, 16)
    better = truncated_svd(weight, 17)
    assert (weight - better.left @ better.right).norm() * 0.999 <= lost
    assert lost < (weight - plain.left @ plain.right).norm()
    assert lowrank.plan(lowrank.decompress(small), rank=16, targets=["0"])["0"].parameters == 16 * (ROWS + 64)


# What statistics know


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
                getattr(other.embeddings["model.embed_tokens"], name), sums, rtol=1e-4, atol=0
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
        per_square = stats.loss_per_square(table) / stats.held_out_ratio(table)  # that is of a trial's change
        predicted += per_square * float(weighed.square().sum())
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


# The rest of the library


def test_recovery_trains_the_factors_of_a_table():
    dense = built(llama)
    small = compress(copy.deepcopy(dense), rank=8, targets=["*embed_tokens"])
    data = batches_of(12)
    before, start = loss_increase(small, dense, data), small.model.embed_tokens.down.weight.detach().clone()
    lowrank.recover(small, dense, data, steps=60, learning_rate=3e-3)
    assert loss_increase(small, dense, data) < before
    assert not torch.equal(small.model.embed_tokens.down.weight, start)
    assert are_one(small, "model.embed_tokens", "lm_head")


def test_block_by_block_goes_with_tables():
    dense = built(llama)
    small = compress(
        copy.deepcopy(dense), rank=16, data=batches_of(8), targets=["*", "*embed_tokens"], sequential=True
    )
    assert are_one(small, "model.embed_tokens", "lm_head")
    assert isinstance(small.model.embed_tokens, LowRankEmbedding)


def test_a_config_asks_for_tables_too(tmp_path):
    dense = built(llama)
    dense.save_pretrained(tmp_path)
    config = lowrank.LowRankConfig(rank=16, targets=["*", "*embed_tokens"])
    small = type(dense).from_pretrained(tmp_path, quantization_config=config).eval()
    assert torch.equal(logits(small), logits(compress(dense, rank=16, targets=["*", "*embed_tokens"])))


def test_tables_that_are_factorized_are_coded_by_another_call():
    small = made_small(built(llama), "model.embed_tokens", "factors")
    before = logits(small)
    quantize(small, targets=["*embed_tokens"])
    assert isinstance(small.model.embed_tokens.down, QuantizedEmbedding)
    assert (logits(small) - before).norm() < 0.02 * before.norm()
    assert are_one(small, "model.embed_tokens", "lm_head")


@pytest.mark.parametrize(
    "targets", [None, ["*", "*embed_tokens"]], ids=["embedding-as-rest", "embedding-as-target"]
)
@pytest.mark.parametrize("correction", [False, True], ids=["codes", "correction"])
@pytest.mark.parametrize("quantize", ["int8", "int4", "auto"])
def test_a_budget_of_bytes_counts_coded_tables(targets, correction, quantize, tmp_path):
    dense = built(llama)
    limit = 90_000 if quantize != "int4" else 70_000
    stats = lowrank.calibrate(dense, batches_of(4), targets=targets)
    ask = {"quantize": quantize, "correction": correction, "targets": targets, "stats": stats}
    plan = lowrank.plan(dense, max_bytes=limit, **ask)
    assert plan["lm_head"].tied_to == "model.embed_tokens"
    small = compress(dense, max_bytes=limit, **ask)
    tensors = [*small.parameters(), *small.buffers()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= limit
    assert are_one(small, "model.embed_tokens", "lm_head")
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(type(small).from_pretrained(tmp_path).eval()), logits(small))


def test_the_predicted_loss_of_a_coded_table_is_that_of_its_codes():
    """A whole embedding and its factors, as `allocate` compares them, against the modules that are made."""
    model, table = built(llama), "model.embed_tokens"
    dense = model.model.embed_tokens.weight.detach().clone()
    drafted = draft(Inspection(model), [table])
    found = quantization_losses_of(model, drafted, storage_formats_of("auto"), None, progress=False)
    assert found.pop(FLOAT) == {}
    for form, quantization_errors in found.items():
        coded = quantize(copy.deepcopy(model), form.scheme.name, targets=[table]).model.embed_tokens
        lost = float((coded.dense_weight() - dense).square().sum() / dense.square().sum())
        assert quantization_errors[table].whole == pytest.approx(lost, rel=0.01)


def test_recovery_goes_through_the_coded_factors_of_a_table():
    dense = built(llama)
    small = compress(copy.deepcopy(dense), rank=32, targets=["*embed_tokens"])
    quantize(small, "int4", targets=["*embed_tokens"])
    data = batches_of(12)
    before = loss_increase(small, dense, data)
    lowrank.recover(small, dense, data, steps=60, learning_rate=3e-3)
    assert loss_increase(small, dense, data) <= before
    assert isinstance(small.model.embed_tokens.down, QuantizedEmbedding)


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

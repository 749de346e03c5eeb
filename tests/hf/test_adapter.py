"""What transformers adds to what a module says of itself: heads, and bases that are saved without them."""

import transformers
from saved_models import FAMILIES, assert_same_outputs, bert, built, factorized, small, structure

import lowrank


def test_a_base_from_a_head_can_be_saved_and_loaded(tmp_path):
    small(FAMILIES["bert-sequence-classification"]).save_pretrained(tmp_path / "head")
    base = transformers.BertModel.from_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    assert_same_outputs(base, transformers.AutoModel.from_pretrained(tmp_path / "base"))


def test_the_base_inside_a_compressed_head_model_can_be_saved(tmp_path):
    head = small(FAMILIES["bert-sequence-classification"])
    head.bert.save_pretrained(tmp_path)
    assert structure(transformers.BertModel.from_pretrained(tmp_path)) == structure(head.bert)


def test_a_compressed_body_inside_a_head_model_can_be_saved(tmp_path):
    head = built(FAMILIES["bert-sequence-classification"])
    lowrank.compress(head.bert, rank=8)
    head.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert factorized(again) == factorized(head)
    assert_same_outputs(head, again)


def test_a_factorized_head_is_loaded_too(tmp_path):
    model = lowrank.compress(
        built(lambda: bert("BertForSequenceClassification", num_labels=40)),
        rank=8,
        targets=["classifier", "*query"],
    )
    assert "classifier" in factorized(model)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, type(model).from_pretrained(tmp_path))
    base = transformers.BertModel.from_pretrained(tmp_path)
    assert [name.rpartition(".")[2] for name in factorized(base)] == ["query", "query"]


def test_a_head_with_any_name_is_left_alone():
    from transformers import BartConfig, BartForSequenceClassification

    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **heads, encoder_ffn_dim=128, decoder_ffn_dim=128)
    decided = lowrank.plan(BartForSequenceClassification(config), rank=2)
    assert decided["classification_head.dense"].reason == "part of a head (classification_head)"
    assert decided["model.encoder.layers.0.fc1"].rank == 2

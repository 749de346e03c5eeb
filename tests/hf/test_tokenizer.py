"""A folder without tokenizer files: transformers makes a tokenizer up, and nothing here uses it."""

import copy
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lowrank
from lowrank import DataError, calibrate, cli, compress, recover
from lowrank.reports.evaluation import (
    accuracy,
    embed,
    embedding_cosine,
    loss_increase,
    perplexity,
    sts_spearman,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(94))]
TEXTS = [f"word{i} word{i + 1} word{2 * i}" for i in range(40)]


def tokenizer_files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} & {"tokenizer.json", "vocab.txt", "tokenizer_config.json"}


@pytest.fixture
def bare(tiny_bert, tmp_path) -> Path:
    """A folder with a model, and without a tokenizer."""
    tiny_bert.save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def whole(bare, tmp_path) -> Path:
    """The same with a tokenizer."""
    shutil.copytree(bare, tmp_path / "whole")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path / "texts.txt"


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program in this process; return its exit code, and what it wrote to both streams."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowrank", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def invented(bare):
    """What transformers makes up."""
    return transformers.AutoTokenizer.from_pretrained(bare)


def test_transformers_makes_up_a_tokenizer_which_is_why_all_this_is_needed(invented):
    assert len(invented) == 5
    assert set(invented("word1 word2")["input_ids"]) <= {1, 2, 3}


COMMANDS = {
    "calibrate": ("calibrate", "{bare}", "{out}", "--data", "{texts}"),
    "plan": ("plan", "{bare}", "--keep", "0.5", "--data", "{texts}"),
    "compress": ("compress", "{bare}", "{out}", "--keep", "0.5", "--data", "{texts}"),
    "eval": ("eval", "{bare}", "--task", "cosine", "--dense", "{bare}", "--data", "{texts}"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_reads_texts_wants_tokenizer_files(run, bare, texts, tmp_path, command):
    places = {"bare": bare, "texts": texts, "out": tmp_path / "out"}
    code, out, err = run(*(part.format(**places) for part in COMMANDS[command]))
    assert (code, out) == (1, "")
    assert err == (
        f"lowrank: {bare}: there are no tokenizer files (BertTokenizer reads tokenizer.json, vocab.txt). "
        "Copy those of the model into the folder.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_vocabulary_far_below_the_models_is_refused(run, whole, texts, tmp_path, command):
    (tmp_path / "small.txt").write_text("\n".join(WORDS[:9]))
    transformers.BertTokenizerFast(str(tmp_path / "small.txt")).save_pretrained(whole)
    places = {"bare": whole, "texts": texts, "out": tmp_path / "out"}
    code, out, err = run(*(part.format(**places) for part in COMMANDS[command]))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "has 9 tokens, and BertModel 99. It is another model's" in err


@pytest.mark.parametrize("files", [(), ("merges.txt",)], ids=["none", "half"])
def test_a_folder_with_none_or_half_of_the_files_has_no_tokenizer(run, tmp_path, texts, files):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for name in files:
        (tmp_path / "gpt2" / name).write_text("#version: 0.2\nw o\nr d\n")
    code, _, err = run("calibrate", tmp_path / "gpt2", tmp_path / "out", "--data", texts)
    assert code == 1
    missing = "there are no tokenizer files (GPT2Tokenizer reads merges.txt, tokenizer.json, vocab.json)"
    assert ("no tokenizer can be loaded" if files else missing) in err


def test_a_tokenizer_without_files_of_its_own_needs_none(tmp_path):
    from lowrank.hf.tokenizer import load_tokenizer

    config = transformers.T5Config(d_model=16, num_layers=1, num_heads=1, d_kv=16, d_ff=16, vocab_size=384)
    transformers.T5Model(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(str(tmp_path))("ab")["input_ids"] == [100, 101, 1]


def test_a_damaged_tokenizer_is_one_line(run, whole, texts, tmp_path):
    (whole / "tokenizer.json").write_text('{"model": 3}')
    (whole / "vocab.txt").unlink(missing_ok=True)
    code, out, err = run("calibrate", whole, tmp_path / "out", "--data", texts)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert f"{whole}: no tokenizer can be loaded" in err


def test_compress_says_that_there_is_no_tokenizer_to_copy_and_writes_none(run, bare, tmp_path):
    code, _, err = run("compress", bare, tmp_path / "out", "--rank", 8)
    assert code == 0
    assert err.startswith(
        f"lowrank: no tokenizer is copied to {tmp_path / 'out'}: {bare}: there are no tokenizer"
    )
    assert not tokenizer_files(tmp_path / "out")


def test_overwrite_never_replaces_a_good_tokenizer_by_a_made_up_one(run, bare, whole, tmp_path):
    assert run("compress", whole, tmp_path / "out", "--rank", 8, "-q") == (0, "", "")
    files = {name: (tmp_path / "out" / name).read_bytes() for name in tokenizer_files(tmp_path / "out")}
    assert "tokenizer.json" in files
    assert run("compress", bare, tmp_path / "out", "--rank", 4, "-q", "--overwrite") == (0, "", "")
    assert files == {name: (tmp_path / "out" / name).read_bytes() for name in files}


def test_overwrite_never_replaces_a_good_tokenizer_by_one_of_another_model(run, bare, whole, tmp_path):
    assert run("compress", whole, tmp_path / "out", "--rank", 8, "-q") == (0, "", "")
    good = (tmp_path / "out" / "tokenizer.json").read_bytes()
    (bare / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    code, _, err = run("compress", bare, tmp_path / "out", "--rank", 4, "--overwrite")
    assert code == 0
    assert re.search(r"no tokenizer is copied to .*: tokenizer=\w+ has 5 tokens, and BertModel", err)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == good


def test_a_model_without_a_vocabulary_needs_no_tokenizer(run, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    code, _, err = run("compress", tmp_path / "vit", tmp_path / "out", "--rank", 8)
    assert (code, err) == (0, "")


@pytest.fixture
def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    return transformers.BertForSequenceClassification(config).eval()


def test_a_made_up_tokenizer_is_refused_from_python_too(tiny_bert, classifier, invented):
    small = compress(copy.deepcopy(tiny_bert), rank=4)
    sequential = {"stats": calibrate(tiny_bert, [torch.arange(64).view(8, 8)] * 4), "sequential": True}
    calls = {
        "calibrate": lambda: calibrate(tiny_bert, TEXTS, invented),
        "compress": lambda: compress(tiny_bert, keep=0.5, data=TEXTS, tokenizer=invented),
        "sequential": lambda: compress(tiny_bert, keep=0.5, data=TEXTS, tokenizer=invented, **sequential),
        "recover": lambda: recover(small, tiny_bert, TEXTS, invented, steps=1),
        "report": lambda: lowrank.report(small, dense=tiny_bert, data=TEXTS, tokenizer=invented),
        "embed": lambda: embed(small, TEXTS, invented),
        "cosine": lambda: embedding_cosine(small, tiny_bert, TEXTS, invented),
        "sts": lambda: sts_spearman(small, [TEXTS[:2], TEXTS[2:4]], [1, 2], invented),
        "perplexity": lambda: perplexity(small, "word1 " * 99, invented, window=8),
        "loss_increase": lambda: loss_increase(small, tiny_bert, TEXTS, invented),
    }
    for call in calls.values():
        with pytest.raises(DataError, match=r"tokenizer=BertTokenizer has 5 tokens, and BertModel 99\."):
            call()
    with pytest.raises(DataError, match="has 5 tokens, and BertForSequenceClassification 99"):
        accuracy(classifier, TEXTS, [0] * 40, invented)


def test_a_model_whose_vocabulary_is_padded_takes_its_tokenizer(tiny_bert, whole):
    """Models round their vocabularies up, to a multiple of 64 or of the number of devices."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    tiny_bert.resize_token_embeddings(128)
    assert calibrate(tiny_bert, TEXTS, tokenizer).tokens == 40 * 5


@pytest.mark.filterwarnings("always::lowrank.FewTokensWarning")
def test_few_texts_are_one_line_on_the_command_line(run, whole, texts, tmp_path):
    code, _, err = run("calibrate", whole, tmp_path / "out", "--data", texts, "-q")
    lines = err.splitlines()
    assert code == 0
    assert lines[0].startswith(
        "lowrank: encoder.layer.0.output.dense: calibrated on 200 tokens, and reads 128"
    )
    assert len(lines) == 1

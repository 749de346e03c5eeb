"""What the commands read: models, tokenizers, texts and statistics."""

import io
import json

import pytest
import transformers
from command_line import one_line

import lowrank
from lowrank import Plan


def test_a_tokenizer_is_copied(run, dense, tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "rank", *map(str, range(92))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(dense)
    assert run("compress", dense, tmp_path / "out", "--rank", 8, "-q").code == 0
    first, second = (
        transformers.AutoTokenizer.from_pretrained(f)("low rank") for f in (dense, tmp_path / "out")
    )
    assert first["input_ids"] == second["input_ids"]


def test_a_model_and_its_tokenizer_are_written_as_one_step(run, dense, small, tmp_path, monkeypatch):
    before = {file.name: file.read_bytes() for file in small.iterdir()}

    def refuse(*args, **kwargs):
        raise Exception("No space left on device")  # as the package tokenizers does

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "rank", *map(str, range(92))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(dense)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", refuse)
    result = run("compress", dense, small, "--rank", 4, "-q", "--overwrite")
    assert result.code == 1
    assert f"{small}: cannot be written: the tokenizer: No space left" in one_line(result)
    assert {file.name: file.read_bytes() for file in small.iterdir()} == before


def test_bench_of_a_model_that_takes_no_tokens_fails_clearly(run, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=16,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    result = run("bench", tmp_path / "vit", tmp_path / "vit")
    assert result.code == 1
    assert "AttributeError" not in one_line(result)


def test_a_folder_without_a_model_is_one_line(run, tmp_path):
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert "no config.json here" in one_line(result)


def test_a_name_that_is_not_on_this_machine_is_one_line(run):
    result = run("inspect", "no-such-model")
    assert result.code == 1
    assert "no-such-model" in one_line(result)


def test_calibrate_plan_compress_and_eval_work_together(run, minilm, texts, tmp_path):
    first = run("calibrate", minilm, tmp_path / "stats", "--data", texts)
    assert (first.code, "36 layers" in first.out) == (0, True)
    decided = run(
        "plan", minilm, "--keep", 0.5, "--stats", tmp_path / "stats", "--out", tmp_path / "plan.json"
    )
    assert decided.code == 0
    assert Plan.load(tmp_path / "plan.json").metric == "loss"
    done = run(
        "compress",
        minilm,
        tmp_path / "out",
        "--plan",
        tmp_path / "plan.json",
        "--stats",
        tmp_path / "stats",
        "-q",
    )
    assert (done.code, done.err) == (0, "")
    arguments = ("--task", "cosine", "--dense", minilm, "--data", texts, "--json")
    measured = run("eval", tmp_path / "out", *arguments)
    assert measured.code == 0
    assert 0.5 < json.loads(measured.out)["value"] < 0.9999
    (tmp_path / "pairs.csv").write_text(
        '"a dog runs","a dog is running",5\n"a dog","the sea",0\n"a cat","a kitten",3\n'
    )
    sts = run("eval", minilm, "--task", "sts", "--data", tmp_path / "pairs.csv")
    assert sts.out.strip() == "sts 1.0000"


def test_compress_calibrates_on_a_file_of_texts(run, minilm, texts, tmp_path):
    done = run("compress", minilm, tmp_path / "out", "--max-bytes", 80_000_000, "--data", texts, "-q")
    assert done.code == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 80_100_000


WRONG_DATA = {
    "no-file": (["--task", "sts", "--data", "missing.csv"], "missing.csv: cannot be read"),
    "no-scores": (
        ["--task", "sts", "--data", "texts.txt"],
        "texts.txt, line 1: not sentence1,sentence2,score",
    ),
    "no-labels": (["--task", "accuracy", "--data", "texts.txt"], "texts.txt, line 1: not sentence<TAB>label"),
    "unknown-task": (["--task", "taste", "--data", "texts.txt"], "choose one of"),
    "cosine-without-dense": (["--task", "cosine", "--data", "texts.txt"], "--dense"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_for_eval_is_exit_code_2(run, minilm, texts, monkeypatch, case):
    monkeypatch.chdir(texts.parent)
    arguments, message = WRONG_DATA[case]
    result = run("eval", minilm, *arguments)
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_data_and_stats_together_are_wrong_use(run, minilm, texts, tmp_path):
    result = run("plan", minilm, "--keep", 0.5, "--data", texts, "--stats", tmp_path)
    assert result.code == 2
    assert "either --data or --stats" in result.err


def test_a_speedup_is_measured_on_the_data(run, minilm, texts):
    done = run("plan", minilm, "--speedup", 1.02, "--data", texts, "--json")
    assert done.code == 0, done.err
    assert "speedup=1.02 (measured" in json.loads(done.out)["budget"]
    assert run("plan", minilm, "--speedup", 1.02).code == 2


def test_code_in_a_folder_never_runs_though_stdin_agrees(run, dense, tmp_path, monkeypatch):
    """Neither a model nor a tokenizer that only such code defines is loaded."""
    mark = tmp_path / "mark"
    (dense / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Any: ...\n")
    config = json.loads((dense / "config.json").read_text())
    stranger = config | {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Any"}}
    tokenizer = {"tokenizer_class": "Stranger", "auto_map": {"AutoTokenizer": ["code.Any", None]}}
    (tmp_path / "text.txt").write_text("one sentence\n" * 8)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    (dense / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    done = run("calibrate", dense, tmp_path / "stats", "--data", tmp_path / "text.txt")
    assert done.code == 1 and "no tokenizer can be loaded" in one_line(done)
    (dense / "config.json").write_text(json.dumps(stranger))
    done = run("inspect", dense)
    assert done.code == 1 and "config.json: the model is defined by code" in one_line(done)
    assert not mark.exists()


def test_calibration_on_the_command_line_has_the_seed_and_the_layers_that_are_asked_for(
    run, minilm, texts, tmp_path
):
    found = {}
    for name, seed in (("one", 0), ("other", 5), ("again", 0)):
        done = run("calibrate", minilm, tmp_path / name, "--data", texts, "--seed", seed, "-q")
        assert done.code == 0, done.err
        found[name] = (tmp_path / name / "stats.safetensors").read_bytes()
    assert found["one"] == found["again"] != found["other"]
    done = run("calibrate", minilm, tmp_path / "few", "--data", texts, "--ignore", "*.query", "-q")
    assert done.code == 0, done.err
    stats = lowrank.Stats.load(tmp_path / "few")
    assert not [name for name in stats.sources if name.endswith("query")]

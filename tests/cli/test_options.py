"""Options of the command line are those of the library."""

import json

import pytest
import transformers
from command_line import one_line

from lowrank.errors import RankError


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


def test_a_seed_can_be_given(run, dense, tmp_path):
    assert run("compress", dense, tmp_path / "out", "--rank", 8, "--seed", 3, "-q").code == 0


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


def test_going_block_by_block_needs_data(run, dense, tmp_path):
    done = run("compress", dense, tmp_path / "out", "--rank", 8, "--sequential")
    assert done.code == 2
    assert "give data=" in done.err


@pytest.mark.parametrize(
    ("given", "rank"), [(["64"], 64), (["*.query=8", "*=16"], {"*.query": 8, "*": 16}), ([], None)], ids=str
)
def test_the_command_line_takes_a_rank_or_a_rank_for_each_pattern(given, rank):
    from lowrank.cli.options import config_of

    assert config_of({"rank": given}).rank == rank


@pytest.mark.parametrize("given", [["many"], ["*=x"], ["8", "*=16"], ["="]], ids=str)
def test_a_rank_on_the_command_line_that_is_no_number_is_refused(given):
    from lowrank.cli.options import config_of

    with pytest.raises(RankError, match=r"--rank .*: give a whole number, or PATTERN=RANK"):
        config_of({"rank": given})

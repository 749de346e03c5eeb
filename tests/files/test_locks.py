"""One writer at a time: a second is refused, and a lock that a kill has left does not lock."""

import multiprocessing
from pathlib import Path

import pytest
from checkpoint_folders import WORK, contents, write

from lowrank import CheckpointError
from lowrank.files import locks
from lowrank.files.folders import settle, staged


def test_ctrl_c_while_the_lock_is_removed_ends_the_lock(tmp_path, monkeypatch):
    def interrupted(self, missing_ok=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "model", config="old")
    write(tmp_path / "model", config="new")
    assert contents(tmp_path / "model") == {"config.json": b"new"}


def test_a_second_writer_is_refused_and_nothing_is_lost(tmp_path):
    folder = write(tmp_path / "model", config="old", tokenizer="old")
    with staged(folder, overwrite=True) as new:
        (new / "config.json").write_text("first")
        with pytest.raises(CheckpointError, match=r"model: another process is writing here"):
            write(folder, config="second")
        settle(folder)  # a reader goes on with the old state
        assert (folder / "config.json").read_text() == "old"
    assert contents(folder) == {"config.json": b"first", "tokenizer.json": b"old"}


def _save_often(folder: Path, text: str, answers) -> None:
    refused = 0
    for _ in range(60):
        try:
            write(folder, config=text, tensors=text)
        except CheckpointError:
            refused += 1
    answers.put(refused)


def test_many_writers_and_readers_at_once_find_whole_states(tmp_path):
    folder = write(tmp_path / "model", config="0", tensors="0", tokenizer="mine")
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()
    writers = [forked.Process(target=_save_often, args=(folder, str(n), answers)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert sum(answers.get(timeout=5) for _ in writers) < 180
    found = contents(folder)
    assert found["config.json"] == found["model.safetensors"]
    assert found["tokenizer.json"] == b"mine"
    assert len(list(folder.iterdir())) == 3


def test_a_lock_file_that_a_kill_has_left_does_not_lock(tmp_path):
    (tmp_path / "model" / WORK).mkdir(parents=True)
    (tmp_path / "model" / WORK / "lock").write_text("")
    write(tmp_path / "model", config="new")
    assert contents(tmp_path / "model") == {"config.json": b"new"}


def test_a_file_system_without_locks_is_written_as_well(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    write(tmp_path / "model", config="new")
    assert contents(tmp_path / "model") == {"config.json": b"new"}

"""Folders and files are written as one step: whatever stops it, a later call finds the old or the new."""

import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from checkpoint_folders import WORK, WRITTEN, contents, linear, names, write
from torch import nn

import lowrank
from lowrank import CheckpointError, calibrate, compress, recover
from lowrank.files.atomic_file import check_file
from lowrank.files.folders import check_folder, settle, staged


class Stop(BaseException):
    """What stands for a kill: nothing is put in order after it."""


@pytest.fixture
def stopped(monkeypatch):
    """A function that calls ``write`` and stops it for good at its n-th renaming."""

    def stop(number: int, folder: Path, **files: str) -> bool:
        rename, calls = Path.rename, []

        def counted(self, target):
            calls.append(target)
            if len(calls) >= number:  # also when the call tries to put things in order
                raise Stop
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted)
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                write(folder, **files)
            except Stop:
                return True
        return False

    return stop


@pytest.mark.parametrize("finish", ["settle", "save"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_call_that_was_stopped_is_finished_or_undone_by_the_next(tmp_path, stopped, number, finish):
    folder = write(tmp_path / "model", config="old", tensors="old", tokenizer="old")
    (folder / "mine.txt").write_text("mine")
    old = contents(folder)
    new = {"config.json": b"new", names["shard"]: b"new", names["index"]: b"new"}
    new |= {"tokenizer.json": b"old", "mine.txt": b"mine"}
    assert stopped(number, folder, config="new", shard="new", index="new") == (number < 7)
    manifests = {(folder / "config.json").read_text()} if (folder / "config.json").exists() else set()
    if manifests:  # whoever finds a manifest finds the tensors that belong to it
        is_old = manifests == {"old"}
        assert (folder / "model.safetensors").exists() == is_old
        assert (folder / names["shard"]).exists() != is_old
    if finish == "save":
        check_folder(folder, overwrite=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    else:
        settle(folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    assert contents(folder) == (old if number <= 3 else new)


def test_the_next_save_removes_what_a_killed_one_was_writing(tmp_path):
    folder = write(tmp_path / "model", config="old")
    (folder / WORK / "new").mkdir(parents=True)
    (folder / WORK / "lock").write_text("")
    (folder / WORK / "new" / "model.safetensors").write_text("half")
    settle(folder)
    assert (folder / "config.json").read_text() == "old"
    write(folder, config="new")
    assert contents(folder) == {"config.json": b"new"}
    assert [entry.name for entry in folder.iterdir()] == ["config.json"]


def test_loading_finishes_what_a_killed_save_has_left(tmp_path):
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(64, 64))  # noqa: E731
    first, second = compress(build(), rank=4), compress(build(), rank=8)
    folder = lowrank.save(first, tmp_path / "model")
    other = lowrank.save(second, tmp_path / "other")
    work = folder / WORK
    (work / "old").mkdir(parents=True)
    (work / "ready").mkdir()
    for name in WRITTEN:
        (folder / name).rename(work / "old" / name)
        (other / name).rename(work / "ready" / name)
    (work / "ready" / "model.safetensors").rename(folder / "model.safetensors")
    again = lowrank.load(folder, build())
    assert torch.equal(again[0].up.weight, second[0].up.weight)
    assert sorted(entry.name for entry in folder.iterdir()) == WRITTEN


def test_a_reader_that_cannot_write_refuses_what_is_half_moved(tmp_path, monkeypatch):
    folder = write(tmp_path / "model", config="old")
    (folder / WORK / "old").mkdir(parents=True)
    (folder / "config.json").rename(folder / WORK / "old" / "config.json")

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(CheckpointError, match=r"model: an interrupted call .*Read-only.*Load it once"):
            lowrank.load(folder)
    settle(folder)
    assert contents(folder) == {"config.json": b"old"}


def test_ctrl_c_between_two_moves_leaves_the_new_state(tmp_path, monkeypatch):
    folder = write(tmp_path / "model", config="old", tensors="old")
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(folder, config="new", tensors="new")
    assert contents(folder) == {"config.json": b"new", "model.safetensors": b"new"}
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_stranger_cannot_have_files_moved_from_or_to_elsewhere(tmp_path):
    folder, secret = write(tmp_path / "model", config="old"), tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("key")
    (folder / WORK).mkdir()
    (folder / WORK / "ready").symlink_to(secret)
    settle(folder)
    assert contents(secret) == {"key": b"key"}
    (folder / WORK / "ready").unlink()
    (folder / WORK / "ready" / "sub").mkdir(parents=True)
    (folder / WORK / "ready" / "sub" / "key").write_text("other")
    (folder / "sub").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"sub: a file or a link is in the way"):
        settle(folder)
    assert contents(secret) == {"key": b"key"}
    shutil.rmtree(folder / WORK)
    (folder / WORK).symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link is where lowrank keeps its own files"):
        write(folder, config="new")
    assert contents(secret) == {"key": b"key"}


def test_neighbours_are_neither_copied_nor_changed(tmp_path):
    folder = write(tmp_path / "model", config="old", tensors="old", tokenizer="old")
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text("log")
    (folder / "link").symlink_to("tokenizer.json")
    (folder / "dangling").symlink_to("nowhere")
    os.chmod(folder, 0o2775)
    os.chmod(folder / "runs" / "log.txt", 0o664)
    kept = ["tokenizer.json", "runs", "runs/log.txt", "link", "dangling"]
    before = [(folder / name).lstat() for name in kept]
    write(folder, config="new", shard="new")
    assert [(folder / name).lstat()[:8] for name in kept] == [status[:8] for status in before]
    assert os.readlink(folder / "link") == "tokenizer.json"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2775
    assert not (folder / "model.safetensors").exists()


def test_statistics_and_snapshots_do_not_remove_a_model(tmp_path):
    folder = lowrank.save(linear(4, 4), tmp_path / "model")
    before = contents(folder)
    write(folder, stats="stats")
    write(folder, stats="newer")
    assert contents(folder) == before | {"stats.json": b"newer"}


def test_links_to_files_of_the_old_checkpoint_are_replaced_and_what_they_lead_to_stays(tmp_path):
    folder, blob = write(tmp_path / "model", config="old"), tmp_path / "blob"
    blob.write_text("shared")
    (folder / "model.safetensors").symlink_to(blob)
    (folder / names["shard"]).symlink_to("nowhere")
    write(folder, config="new", tensors="new")
    assert blob.read_text() == "shared"
    assert not (folder / "model.safetensors").is_symlink()
    assert contents(folder) == {"config.json": b"new", "model.safetensors": b"new"}


def test_a_folder_in_the_way_of_a_file_is_named_and_nothing_is_changed(tmp_path):
    folder = write(tmp_path / "model", config="old")
    (folder / "model.safetensors").mkdir()
    (folder / "model.safetensors" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a folder is in the way"):
        write(folder, config="new", tensors="new")
    write(folder, config="new", shard="new")
    assert contents(folder) == {
        "config.json": b"new",
        names["shard"]: b"new",
        "model.safetensors/mine": b"mine",
    }


def test_files_in_sub_folders_are_moved_as_well(tmp_path):
    for text in ("old", "new"):
        with staged(tmp_path / "model", overwrite=True) as new:
            (new / "templates").mkdir()
            (new / "templates" / "chat").write_text(text)
    assert contents(tmp_path / "model") == {"templates/chat": b"new"}


@pytest.mark.parametrize("folder", ["", ".", "..", "/", "../..", "model/.."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_without_a_name_of_its_own_is_refused_by_name(tmp_path, monkeypatch, folder, overwrite):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lowrank.json").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"folder='{re.escape(str(Path(folder)))}': .*by its name"):
        lowrank.save(linear(4, 4), folder, overwrite=overwrite)
    assert contents(tmp_path) == {"lowrank.json": b"mine"}


def test_statistics_and_snapshots_need_a_folder_with_a_name_too(mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [torch.randn(8, 64) for _ in range(6)]
    with pytest.raises(CheckpointError, match=r"folder='\.': .*by its name"):
        calibrate(mlp, data).save("", overwrite=True)
    with pytest.raises(CheckpointError, match=r"folder='\.': .*by its name"):
        recover(compress(nn.Sequential(*mlp), rank=8), mlp, data, steps=2, checkpoint_dir=".")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["./out", "out/", "a/../out", "../{}/out"])
def test_a_folder_with_a_name_is_written_however_it_is_spelled(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    lowrank.save(linear(4, 4), folder.format(tmp_path.name))
    assert (tmp_path / "out" / "lowrank.json").is_file()


def test_the_working_directory_is_written_when_it_is_spelled_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lowrank.save(linear(4, 4), tmp_path)
    assert (tmp_path / "lowrank.json").is_file()


def test_a_check_leaves_nothing_behind(tmp_path):
    check_folder(tmp_path / "a" / "b", overwrite=False)
    check_file(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_only_the_rest_of_a_killed_save_is_empty(tmp_path):
    (tmp_path / "model" / WORK / "new").mkdir(parents=True)
    (tmp_path / "model" / WORK / "new" / "model.safetensors").write_text("half")
    lowrank.save(linear(4, 4), tmp_path / "model")
    assert sorted(contents(tmp_path / "model")) == WRITTEN

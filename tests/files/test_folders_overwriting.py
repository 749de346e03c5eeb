"""A folder is overwritten only when asked, and as one step."""

import re
from pathlib import Path

import pytest
import torch
from checkpoint_folders import Mixed, build_mlp, compressed, contents, example_input
from torch import nn

import lowrank
from lowrank import CheckpointError


def test_a_folder_with_files_is_not_overwritten_unasked(mlp_folder):
    before = contents(mlp_folder)
    with pytest.raises(CheckpointError, match=r"not empty.*overwrite"):
        lowrank.save(build_mlp(), mlp_folder)
    assert contents(mlp_folder) == before


def test_overwriting_replaces_the_checkpoint_and_leaves_other_files(mlp_folder):
    (mlp_folder / "notes.txt").write_text("mine")
    (mlp_folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    model = compressed(Mixed)
    lowrank.save(model, mlp_folder, overwrite=True)
    assert (mlp_folder / "notes.txt").read_text() == "mine"
    assert not (mlp_folder / "model-00001-of-00002.safetensors").exists()
    x = example_input(model)
    assert torch.equal(lowrank.load(mlp_folder, Mixed().eval())(x), model(x))
    assert [p.name for p in mlp_folder.parent.iterdir()] == [mlp_folder.name]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "small").write_text("a file")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "small")) + ".*a file is in the way"):
        lowrank.save(build_mlp(), tmp_path / "small")
    assert (tmp_path / "small").read_text() == "a file"


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=re.escape(str(tmp_path / "file" / "small")) + ": cannot be written"
    ):
        lowrank.save(build_mlp(), tmp_path / "file" / "small")


def test_missing_parents_are_made(tmp_path):
    assert (lowrank.save(build_mlp(), tmp_path / "a" / "b" / "c") / "lowrank.json").is_file()


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lowrank.save(build_mlp(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "lowrank.json").is_file()


@pytest.mark.parametrize("call", ["mkdir", "write_text", "rename"])
def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path, monkeypatch, call):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(CheckpointError, match=r"small: cannot be written: .*Permission denied"):
        lowrank.save(build_mlp(), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_with_the_folders_name(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowrank.checkpoint.checkpoint.save_file", refuse)
    with pytest.raises(CheckpointError, match=r"small: cannot be written: .*No space left"):
        lowrank.save(build_mlp(), tmp_path / "small")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_while_tensors_are_written_leaves_the_old_folder_whole(mlp_folder, monkeypatch, failure):
    before = contents(mlp_folder)

    def interrupted(tensors, file, metadata):
        Path(file).write_bytes(b"half a file")
        raise failure("stopped here")

    monkeypatch.setattr("lowrank.checkpoint.checkpoint.save_file", interrupted)
    with pytest.raises(failure, match="stopped here"):
        lowrank.save(compressed(Mixed), mlp_folder, overwrite=True)
    assert contents(mlp_folder) == before
    assert list(mlp_folder.parent.iterdir()) == [mlp_folder]


@pytest.mark.parametrize("failing_call", [1, 2], ids=["moving-the-old-away", "moving-the-new-in"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failure_while_folders_are_exchanged_leaves_the_old_folder_whole(
    mlp_folder, monkeypatch, failure, failing_call
):
    before = contents(mlp_folder)
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise failure("stopped")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((KeyboardInterrupt, CheckpointError), match="stopped"):
        lowrank.save(compressed(Mixed), mlp_folder, overwrite=True)
    assert len(calls) >= failing_call
    assert contents(mlp_folder) == before
    assert list(mlp_folder.parent.iterdir()) == [mlp_folder]


def test_an_interrupt_while_a_new_folder_is_written_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank.checkpoint.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowrank.save(build_mlp(), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_overwriting_keeps_every_file_that_is_no_part_of_the_checkpoint(tmp_path):
    folder = lowrank.save(compressed(build_mlp), tmp_path / "small")
    (folder / "my_embeddings.safetensors").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("a stale shard")
    lowrank.save(compressed(build_mlp), folder, overwrite=True)
    assert (folder / "my_embeddings.safetensors").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("name", ["é" * 300, "a/" * 3000], ids=["long", "deep"])
def test_a_name_that_is_too_long_is_no_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no lowrank\.json and no config\.json here"):
        lowrank.load(name)
    with pytest.raises(CheckpointError, match=r"cannot be written|too long"):
        lowrank.save(nn.Sequential(nn.Linear(8, 8)), name)

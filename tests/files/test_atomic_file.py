"""A file is written as one step, and stays what it was: a link, a device, private."""

import contextlib
import json
import os
import stat

import pytest
from checkpoint_folders import WORK, contents, write

from lowrank import CheckpointError, Plan
from lowrank.files.atomic_file import replaced


def test_new_files_have_the_mode_that_the_umask_gives_and_private_ones_stay_private(tmp_path):
    before = os.umask(0o027)
    try:
        folder = write(tmp_path / "model", config="old")
        assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o640
        os.chmod(folder / "config.json", 0o600)
        write(folder, config="new", tensors="new")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
    assert modes == {"config.json": 0o600, "model.safetensors": 0o640}


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "plan.json").symlink_to("real.json")
    Plan("Model").save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["model"] == "Model"
    assert len(list(tmp_path.iterdir())) == 2


def test_devices_are_written_to_and_stay_devices(tmp_path):
    with pytest.raises(CheckpointError, match=r"/dev/full: cannot be written: .*No space left"):
        Plan("Model").save("/dev/full")
    Plan("Model").save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_private_file_stays_private(tmp_path):
    (tmp_path / "plan.json").write_text("old")
    os.chmod(tmp_path / "plan.json", 0o600)
    Plan("Model").save(tmp_path / "plan.json")
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("path", ["", ".", "folder"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=rf"'{path or '.'}': a folder is in the way"):
        Plan("Model").save(path)


def test_the_next_call_removes_what_a_killed_one_was_writing_of_a_file(tmp_path):
    (tmp_path / f".plan.json{WORK}" / "new").mkdir(parents=True)
    (tmp_path / f".plan.json{WORK}" / "new" / "plan.json").write_text("half")
    (tmp_path / "plan.json").write_text("old")
    Plan("Model").save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == Plan("Model")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_an_error_while_a_file_is_written_leaves_the_old_one(tmp_path):
    (tmp_path / "plan.json").write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replaced(tmp_path / "plan.json") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"plan.json": b"old"}

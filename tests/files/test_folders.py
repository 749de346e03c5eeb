"""Folders and files are written as one step: whatever stops it, a later call finds the old or the new."""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank import CheckpointError, LowRankError, Plan, calibrate, compress, recover
from lowrank.allocation.latency import LatencyTable
from lowrank.demo import write_texts
from lowrank.files import locks
from lowrank.files.atomic_file import check_file, replaced
from lowrank.files.folders import check_folder, settle, staged

WORK = ".lowrank-save"
WRITTEN = ["README.md", "lowrank.json", "model.safetensors"]
"""What `lowrank.save` writes for a module."""


def linear(*sizes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(*sizes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, **files: str) -> Path:
    """Save a checkpoint of these files; ``config`` is its manifest."""
    with staged(folder, overwrite=True) as new:
        for name, text in files.items():
            (new / names[name]).write_text(text)
    return folder


names = {
    "config": "config.json",
    "tensors": "model.safetensors",
    "shard": "model-00001-of-00002.safetensors",
    "index": "model.safetensors.index.json",
    "tokenizer": "tokenizer.json",
    "stats": "stats.json",
}


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


# --- stopped half way


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


def test_ctrl_c_while_the_lock_is_removed_ends_the_lock(tmp_path, monkeypatch):
    def interrupted(self, missing_ok=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "model", config="old")
    write(tmp_path / "model", config="new")
    assert contents(tmp_path / "model") == {"config.json": b"new"}


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


# --- neighbours


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


# --- which folders


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


# --- two at once


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


# --- volumes, folders that cannot be written, full disks


@contextmanager
def mounted(folder: Path, *options: str):
    """Mount a small file system at ``folder``, or skip the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", *options, str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def volume(folder: Path):
    return mounted(folder, "-t", "tmpfs", "-o", "size=256k", "tmpfs")


def test_a_mount_point_is_saved_into(tmp_path):
    with volume(tmp_path / "volume") as folder:
        for _ in range(2):
            lowrank.save(linear(4, 4), folder, overwrite=True)
        assert sorted(contents(folder)) == WRITTEN


def test_a_full_volume_is_an_error_and_the_old_files_stay(tmp_path):
    stats = calibrate(nn.Sequential(nn.Linear(300, 4)), [torch.randn(8, 300)] * 4)
    large = lowrank.plan(nn.Sequential(*[nn.Linear(64, 64) for _ in range(60)]), rank=4)
    with volume(tmp_path / "volume") as at:
        lowrank.save(linear(4, 4), at / "model")
        Plan("Model").save(at / "plan.json")
        table = LatencyTable({"device": "cpu"})
        table.save(at / "table.json")
        free = os.statvfs(at)
        (at / "filler").write_bytes(bytes((free.f_bavail - 3) * free.f_frsize))
        before = contents(at)
        table.seconds = {f"{n}": [(n, 1.0)] * 40 for n in range(400)}
        calls = {
            "model": lambda: lowrank.save(linear(300, 300), at / "model", overwrite=True),
            "stats": lambda: stats.save(at / "stats"),
            "plan.json": lambda: large.save(at / "plan.json"),
            "table.json": lambda: table.save(at / "table.json"),
        }
        for name, call in calls.items():
            with pytest.raises(CheckpointError, match=rf"{name}: cannot be written: .*No space left"):
                call()
            assert contents(at) == before
        assert not (at / "stats").exists()


@pytest.fixture
def small_files():
    """Let no file grow beyond 2,000 bytes: the file system refuses in the middle of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def test_a_model_of_transformers_that_does_not_fit_is_an_error_and_the_old_one_stays(
    tiny_bert, tmp_path, small_files
):
    folder = lowrank.save(compress(tiny_bert, rank=8), tmp_path / "model")
    before = contents(folder)
    with small_files(), pytest.raises(CheckpointError, match=r"model: cannot be written: .*too large"):
        lowrank.save(tiny_bert, folder, overwrite=True)
    assert contents(tmp_path) == {f"model/{name}": data for name, data in before.items()}


def test_a_snapshot_that_does_not_fit_is_an_error_and_the_one_before_stays(mlp, tmp_path, small_files):
    data = [torch.randn(8, 64) for _ in range(6)]
    small = compress(nn.Sequential(*mlp), rank=8)
    recover(small, mlp, data, steps=2, checkpoint_dir=tmp_path / "run")
    before = contents(tmp_path)
    with small_files(), pytest.raises(CheckpointError, match=r"run: cannot be written: .*too large"):
        recover(small, mlp, data, steps=4, checkpoint_dir=tmp_path / "run")
    assert contents(tmp_path) == before


def test_a_picture_that_does_not_fit_is_an_error_and_the_old_one_stays(mlp, tmp_path, small_files):
    pytest.importorskip("matplotlib")
    plan = lowrank.plan(mlp, rank=8)
    (tmp_path / "ranks.png").write_bytes(b"old")
    with small_files(), pytest.raises(CheckpointError, match=r"ranks\.png: cannot be written: .*too large"):
        lowrank.plot_ranks(plan, tmp_path / "ranks.png")
    assert contents(tmp_path) == {"ranks.png": b"old"}


def test_hidden_states_that_do_not_fit_are_an_error_and_not_a_crash(tiny_bert, tmp_path):
    with volume(tmp_path / "volume") as at:
        free = os.statvfs(at)
        (at / "filler").write_bytes(bytes((free.f_bavail - 4) * free.f_frsize))
        data = [{"input_ids": torch.arange(64)[None] % 99} for _ in range(4)]
        with pytest.raises(CheckpointError, match=r"volume/\w+: cannot be written: .*No space"):
            compress(tiny_bert, keep=0.5, data=data, sequential=True, offload_folder=at)
        assert [entry.name for entry in at.iterdir()] == ["filler"]


@pytest.fixture
def read_only(tmp_path):
    """A folder on a file system that is mounted read-only."""
    (tmp_path / "there").mkdir()
    with mounted(tmp_path / "volume", "--bind", str(tmp_path / "there")) as folder:
        command = ["mount", "-o", "remount,ro,bind", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting read-only is not allowed here")
        yield folder


def test_a_checkpoint_on_a_read_only_volume_is_loaded(tmp_path, read_only):
    lowrank.save(linear(4, 4), tmp_path / "there" / "model")
    (tmp_path / "there" / "model" / WORK / "new").mkdir(parents=True)
    lowrank.load(read_only / "model", linear(4, 4))
    (tmp_path / "there" / "model" / WORK / "old").mkdir()
    for name in ("lowrank.json", "model.safetensors"):
        shutil.move(tmp_path / "there" / "model" / name, tmp_path / "there" / "model" / WORK / "old")
    with pytest.raises(CheckpointError, match=r"an interrupted call .*Read-only"):
        lowrank.load(read_only / "model", linear(4, 4))


@pytest.mark.parametrize("name", ["", "model"], ids=["itself", "below"])
def test_a_read_only_volume_is_refused_before_the_work(mlp, read_only, name):
    small = compress(nn.Sequential(*mlp), rank=8)
    forwards = []
    mlp.register_forward_hook(lambda *_: forwards.append(1))
    for call in (
        lambda: recover(small, mlp, [torch.randn(8, 64)] * 4, steps=1, checkpoint_dir=read_only / name),
        lambda: check_folder(read_only / name, overwrite=False),
        lambda: check_file(read_only / name / "plan.json"),
    ):
        with pytest.raises(CheckpointError, match=r"cannot be written: .*(Read-only|No such file)"):
            call()
    assert not forwards


# --- single files


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

"""Volumes that are full, read-only or mounted: an error with its name, and the old files stay."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_folders import WORK, WRITTEN, contents, linear
from torch import nn

import lowrank
from lowrank import CheckpointError, Plan, calibrate, compress, recover
from lowrank.allocation.latency import LatencyTable
from lowrank.files.atomic_file import check_file
from lowrank.files.folders import check_folder


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

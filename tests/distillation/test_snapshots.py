"""Snapshots of training runs: what was written comes back, and anything else is refused by name."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank import CheckpointError
from lowrank.distillation.snapshots import Snapshot
from lowrank.files.integrity import digest_of, sealed

PARAMETERS = [torch.arange(6.0).reshape(2, 3), torch.ones(4)]


@pytest.fixture
def folder(tmp_path):
    moments = ([p + 1 for p in PARAMETERS], [p + 2 for p in PARAMETERS])
    Snapshot(3, 0.25, 0.5, PARAMETERS, [p * 2 for p in PARAMETERS], moments).save(tmp_path / "run")
    return tmp_path / "run"


def change(folder, **fields) -> None:
    """Change fields of the JSON, and make its digests fit again, as anybody can."""
    file = folder / "snapshot.json"
    data = json.loads(file.read_text()) | fields
    tensors = load_file(folder / "snapshot.safetensors")
    data["tensors"] = {name: digest_of(tensor) for name, tensor in tensors.items()}
    file.write_text(json.dumps(sealed(data)))


def test_a_snapshot_comes_back(folder):
    found = Snapshot.load(folder, PARAMETERS)
    assert (found.steps, found.progress, found.best, found.blocks) == (3, 0.25, 0.5, None)
    made = [PARAMETERS, [p * 2 for p in PARAMETERS], [p + 1 for p in PARAMETERS], [p + 2 for p in PARAMETERS]]
    for group, expected in zip((found.parameters, found.kept, *found.moments), made, strict=True):
        assert all(torch.equal(mine, p) for mine, p in zip(group, expected, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": -1},
        {"steps": 10**400},
        {"steps": 1.5},
        {"steps": "3"},
        {"progress": -0.1},
        {"progress": 10**400},
        {"best": float("nan")},
        {"best": None},
    ],
    ids=str,
)
def test_impossible_numbers_are_refused_by_name(fields, folder):
    change(folder, **fields)
    with pytest.raises(CheckpointError, match=rf"snapshot\.json: {next(iter(fields))}"):
        Snapshot.load(folder, PARAMETERS)


def test_a_changed_number_is_refused(folder):
    file = folder / "snapshot.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 4}))
    with pytest.raises(CheckpointError, match=r"snapshot\.json: is not as it was saved"):
        Snapshot.load(folder, PARAMETERS)


def test_a_changed_tensor_is_refused_by_name(folder):
    tensors = load_file(folder / "snapshot.safetensors")
    tensors["kept.1"][2] += 1
    save_file(tensors, folder / "snapshot.safetensors")
    with pytest.raises(CheckpointError, match=r"the tensor kept\.1 is not the one that was saved"):
        Snapshot.load(folder, PARAMETERS)


def test_nan_is_refused_though_the_digests_fit(folder):
    tensors = load_file(folder / "snapshot.safetensors")
    tensors["means.0"][0, 0] = float("nan")
    save_file(tensors, folder / "snapshot.safetensors")
    change(folder)
    with pytest.raises(CheckpointError, match=r"tensor means\.0 .*not finite"):
        Snapshot.load(folder, PARAMETERS)


@pytest.mark.parametrize("name", ["snapshot.json", "snapshot.safetensors"])
def test_a_pipe_is_refused_without_waiting(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=re.escape(str(folder / name))):
        Snapshot.load(folder, PARAMETERS)

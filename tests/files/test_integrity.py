"""Digests: what has changed since it was saved is refused by its name."""

import json
import struct
from pathlib import Path

import pytest
import torch
from checkpoint_folders import METADATA, assert_refused, build_mlp, edit, sealed_again
from safetensors.torch import load_file, save_file

import lowrank


def tensor_place(file: Path, name: str) -> int:
    """Return where in ``file`` the data of a tensor starts."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]


@pytest.mark.parametrize("name", ["0.up.weight", "2.down.weight", "2.up.bias"])
def test_a_flipped_bit_is_refused_with_the_name_of_the_tensor(mlp_folder, name):
    file = mlp_folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[tensor_place(file, name)] ^= 1
    file.write_bytes(data)
    assert_refused(mlp_folder, str(file), name)


def test_a_missing_tensor_is_refused_by_name(mlp_folder):
    file = mlp_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["0.down.weight"]
    save_file(tensors, file, metadata=METADATA)
    assert_refused(mlp_folder, str(file), "0.down.weight")


def test_an_extra_tensor_is_refused_by_name(mlp_folder):
    file = mlp_folder / "model.safetensors"
    save_file({**load_file(file), "intruder": torch.zeros(2)}, file, metadata=METADATA)
    assert_refused(mlp_folder, str(file), "intruder")


def test_a_changed_plan_is_refused_though_the_tensors_fit_it(mlp_folder):
    edit(mlp_folder, lambda data: data["plan"]["layers"][0].update(relative_error=0.5))
    assert_refused(mlp_folder, str(mlp_folder / "lowrank.json"), "is not as it was saved")
    sealed_again(mlp_folder)
    assert lowrank.load(mlp_folder, build_mlp())[0].relative_error == 0.5

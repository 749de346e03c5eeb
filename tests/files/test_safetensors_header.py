"""Headers of strangers: what they say of a tensor is checked before anything is read."""

import json
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_folders import assert_refused, compressed, every_model, sealed_again
from torch import nn

import lowrank


@every_model
def test_the_file_has_the_size_that_the_report_predicts(build, tmp_path):
    model = compressed(build)
    folder = lowrank.save(model, tmp_path / "small")
    assert (folder / "model.safetensors").stat().st_size == lowrank.report(model).checkpoint_bytes


@pytest.mark.parametrize(
    "keep", [0, 4, 100, 0.5, -1], ids=["empty", "4-bytes", "header", "half", "one-byte-short"]
)
def test_a_truncated_file_is_refused(mlp_folder, keep):
    file = mlp_folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert_refused(mlp_folder, str(file))


def test_a_changed_dtype_in_the_header_is_refused_with_the_name_of_the_tensor(mlp_folder):
    file = mlp_folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["0.up.weight"]["dtype"] = "I32"
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    file.write_bytes(data[:8] + text + data[8 + length :])
    assert_refused(mlp_folder, str(file), "0.up.weight")


def with_header(file: Path, change) -> None:
    """Change the header of a safetensors file, and its length with it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**63, 0]},
        {"shape": [-8, -96]},
        {"shape": "many"},
        {"shape": [96.0, 8]},
        {"dtype": "X7"},
        {"dtype": ["F32"]},
        {"dtype": "C64"},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [8, 0]},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_impossible_entries_of_a_header_are_refused_by_name(mlp_folder, change):
    file = mlp_folder / "model.safetensors"
    with_header(file, lambda header: header["0.up.weight"].update(change))
    assert_refused(mlp_folder, str(file), "0.up.weight")


def test_integers_in_place_of_numbers_are_refused_though_the_digests_fit(mlp_folder):
    with_header(mlp_folder / "model.safetensors", lambda header: header["2.up.bias"].update(dtype="I32"))
    sealed_again(mlp_folder)
    assert_refused(mlp_folder, "2.up.bias is stored as I32", "floating-point numbers")


@pytest.mark.parametrize("outputs", [1, 7], ids=["one-output", "outputs"])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("name", ["x", "a_longer_name"])
def test_outputs_are_bit_identical_wherever_the_tensors_lie_in_the_file(tmp_path, rank, outputs, name):
    def build() -> nn.Module:
        return nn.Sequential(OrderedDict({name: nn.Linear(61, 53), "last": nn.Linear(53, outputs)})).eval()

    torch.manual_seed(0)
    model = lowrank.compress(build(), rank=rank, targets=[name])
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), build())
    assert all(t.data_ptr() % 64 == 0 for t in again.parameters())
    for rows in (1, 2, 5, 33):
        x = torch.randn(rows, 61)
        assert torch.equal(again(x), model(x))

"""JSON of strangers: whatever it says, the answer is a plan or an error of this library."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_folders import Mixed, assert_refused, build_mlp, compressed, edit, sealed_again, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank
from lowrank import CheckpointError, LowRankError


def test_a_newer_format_is_refused(mlp_folder):
    edit(mlp_folder, lambda data: data.update(format=99))
    assert_refused(mlp_folder, "lowrank.json", "format 99", "newer")


def test_a_newer_plan_is_refused(mlp_folder):
    edit(mlp_folder, lambda data: data["plan"].update(format=99))
    assert_refused(mlp_folder, "lowrank.json", "format 99", "newer")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\ud800"], ids=lambda t: repr(t[:8])
)
def test_a_structure_file_that_is_not_json_is_refused(mlp_folder, text):
    (mlp_folder / "lowrank.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_refused(mlp_folder, str(mlp_folder / "lowrank.json"))


@pytest.mark.parametrize("change", [-1, 1], ids=["older", "newer"])
def test_a_folder_of_another_version_is_refused_with_what_to_do(mlp_folder, change):
    edit(mlp_folder, lambda data: data.update(format=data["format"] + change))
    advice = "Install a newer lowrank" if change > 0 else "read it with the version that wrote it"
    assert_refused(mlp_folder, str(mlp_folder / "lowrank.json"), "has format", advice)


def nested(depth: int) -> list:
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    "value",
    [nested(100), nested(900), 10**400, -(10**400), {}, "\ud800"],
    ids=["nested-100", "nested-900", "huge", "-huge", "object", "surrogate"],
)
@pytest.mark.parametrize(
    "field", ["rank", "in_features", "relative_error", "layer_type", "bias", "shares_down_with", "tied_to"]
)
def test_impossible_fields_of_a_layer_are_refused_in_a_short_sentence(mlp_folder, field, value):
    sealed_again(mlp_folder, lambda data: data["plan"]["layers"][0].update({field: value}))
    with pytest.raises(CheckpointError, match=re.escape(str(mlp_folder))) as caught:
        lowrank.load(mlp_folder, build_mlp())
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("file", ["lowrank.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "loop", "device"])
def test_what_is_no_ordinary_file_is_refused_without_waiting(mlp_folder, file, kind):
    place = mlp_folder / file
    place.unlink()
    make = {
        "pipe": os.mkfifo,
        "directory": Path.mkdir,
        "loop": lambda p: p.symlink_to(p.name),
        "device": lambda p: p.symlink_to("/dev/zero"),
    }
    make[kind](place)
    with pytest.raises(CheckpointError, match=re.escape(str(mlp_folder))):
        lowrank.load(mlp_folder, build_mlp())


def test_links_to_files_are_followed(mlp_folder, tmp_path):
    x, expected = torch.randn(3, 64), lowrank.load(mlp_folder, build_mlp())
    for file in list(mlp_folder.iterdir()):
        file.rename(tmp_path / file.name)
        file.symlink_to(Path("..") / file.name)
    assert torch.equal(lowrank.load(mlp_folder, build_mlp())(x), expected(x))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> tuple[Path, str]:
    folder = lowrank.save(compressed(Mixed), tmp_path_factory.mktemp("fuzz") / "small")
    return folder, (folder / "lowrank.json").read_text()


def _paths(node: object, path: tuple = ()) -> Iterator[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from _paths(child, (*path, key))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=250, derandomize=True, deadline=None)
@given(data=st.data())
def test_no_json_makes_anything_but_a_lowrank_error(fuzzed, data):
    folder, text = fuzzed
    structure = json.loads(text)
    *path, key = data.draw(st.sampled_from(list(_paths(structure))), label="path")
    parent = structure
    for step in path:
        parent = parent[step]
    action = data.draw(st.sampled_from(["replace", "delete", "swap", "add"]), label="action")
    if action == "delete":
        del parent[key]
    elif action == "add":  # mostly names that mean something
        names = st.sampled_from([*structure["tensors"], "norm", "0", "format"]) | st.text(max_size=8)
        table = data.draw(st.sampled_from(["tensors", "aliases", "plan"]), label="table")
        structure[table][data.draw(names, label="key")] = data.draw(names | json_values, label="value")
    elif action == "replace":
        parent[key] = data.draw(json_values, label="value")
    else:  # a valid value in the wrong place
        *other, last = data.draw(st.sampled_from(list(_paths(structure))), label="taken from")
        source = structure
        for step in other:
            source = source[step]
        parent[key] = json.loads(json.dumps(source[last]))
    (folder / "lowrank.json").write_text(json.dumps(structure))
    model = Mixed().eval()
    before = snapshot(model)
    try:
        lowrank.load(folder, model)
    except LowRankError:
        assert snapshot(model) == before

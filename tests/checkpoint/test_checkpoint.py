"""Folders written by `lowrank.save`: they come back bit for bit, or fail by name and change nothing."""

import json
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from allocations import LargestTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import CheckpointError, LowRankError, LowRankLinear
from lowrank.files.integrity import digest_of, sealed

METADATA = {"format": "pt"}


class Mixed(nn.Module):
    """float32, bfloat16 and float64 parameters, int64, bool and scalar buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.norm = nn.BatchNorm1d(96)
        self.last = nn.Linear(96, 64, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.full((64,), 1.5, dtype=torch.float64))
        self.register_buffer("codes", torch.arange(7))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).to(torch.bfloat16)) * self.scale


class Tied(nn.Module):
    """A decoder that is the embedding, and one linear layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 64)
        self.body = nn.Linear(64, 64)
        self.decoder = nn.Linear(64, 99)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.body(self.embedding(ids)))


def build_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def build_bf16() -> nn.Module:
    return build_mlp().to(torch.bfloat16)


BUILDERS = {"float32": build_mlp, "bfloat16": build_bf16, "mixed-dtypes": Mixed, "tied": Tied}
every_model = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def compressed(build) -> nn.Module:
    torch.manual_seed(0)
    return lowrank.compress(build().eval(), rank=8)


def example_input(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Tied):
        return torch.randint(99, (5, 7), generator=generator)
    dtype = next(model.parameters()).dtype if isinstance(model, nn.Sequential) else torch.float32
    return torch.randn(5, 64, generator=generator).to(dtype)


def snapshot(model: nn.Module) -> list[tuple]:
    """Describe a model so that any change to a module or a tensor shows."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    tensors = [
        (n, id(p), None if p.is_meta else p.detach().clone().tolist())
        for n, p in [*model.named_parameters(), *model.named_buffers()]
    ]
    return [*modules, *tensors]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a compressed MLP."""
    return lowrank.save(compressed(build_mlp), tmp_path / "small")


def edit(folder: Path, change) -> None:
    file = folder / "lowrank.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def assert_refused(folder: Path, *parts: str, model: nn.Module | None = None) -> None:
    """Loading raises a CheckpointError whose message has every part, and the model is as before."""
    model = build_mlp() if model is None else model
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        lowrank.load(folder, model)
    for part in parts:
        assert part in str(caught.value)
    assert snapshot(model) == before


# --- what is saved comes back


@every_model
def test_loading_gives_bit_identical_outputs_and_tensors(build, tmp_path):
    model = compressed(build)
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), build().eval())
    inputs = example_input(model)
    assert torch.equal(again(inputs), model(inputs))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype, name


@every_model
def test_the_file_has_the_size_that_the_report_predicts(build, tmp_path):
    model = compressed(build)
    folder = lowrank.save(model, tmp_path / "small")
    assert (folder / "model.safetensors").stat().st_size == lowrank.report(model).checkpoint_bytes


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_a_buffer_of_any_dtype_is_either_stored_at_the_predicted_size_or_refused_by_name(dtype, tmp_path):
    model = compressed(build_mlp)
    model.register_buffer("table", torch.zeros(5).to(dtype))
    refusal = None
    try:
        size = lowrank.report(model).checkpoint_bytes
        folder = lowrank.save(model, tmp_path / "small")
    except CheckpointError as error:
        refusal = str(error)
    if refusal is None:
        assert (folder / "model.safetensors").stat().st_size == size
    else:
        assert "table" in refusal and str(dtype) in refusal


@every_model
def test_a_meta_model_is_filled_completely(build, tmp_path):
    model = compressed(build)
    lowrank.save(model, tmp_path / "small")
    with torch.device("meta"):
        empty = build().eval()
    again = lowrank.load(tmp_path / "small", empty)
    assert {tensor.device.type for tensor in again.state_dict().values()} == {"cpu"}
    inputs = example_input(model)
    assert torch.equal(again(inputs), model(inputs))


def test_loading_into_a_meta_model_never_makes_a_dense_weight(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512))

    with LargestTensor() as control:
        build()
    assert control.elements == 512 * 512  # the instrument sees dense weights
    lowrank.save(lowrank.compress(build(), rank=8), tmp_path / "small")
    with torch.device("meta"):
        empty = build()
    with LargestTensor() as loading:
        lowrank.load(tmp_path / "small", empty)
    assert 0 < loading.elements <= 8 * 512


def test_a_buffer_that_no_checkpoint_holds_is_not_left_without_data_silently(tmp_path):
    def build() -> nn.Module:
        model = build_mlp()
        model.register_buffer("scale", torch.ones(64), persistent=False)
        return model

    lowrank.save(compressed(build), tmp_path / "small")
    with torch.device("meta"):
        empty = build()
    refusal = ""
    try:
        again = lowrank.load(tmp_path / "small", empty)
    except LowRankError as error:
        refusal = str(error)
    assert "scale" in refusal or not again.scale.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_stay_ties(device, tmp_path):
    lowrank.save(compressed(Tied), tmp_path / "small")
    with torch.device(device):
        model = Tied()
    again = lowrank.load(tmp_path / "small", model)
    assert again.decoder.weight is again.embedding.weight
    assert "decoder.weight" not in load_file(tmp_path / "small" / "model.safetensors")


def test_a_module_used_twice_is_stored_once_and_stays_shared(tmp_path):
    def build() -> nn.Module:
        shared = nn.Linear(64, 64)
        return nn.Sequential(shared, nn.Linear(64, 64), shared)

    model = lowrank.compress(build().eval(), rank=8)
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), build().eval())
    assert again[0].weight is again[2].weight
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))


def test_views_of_one_storage_are_saved_with_their_own_values(tmp_path):
    model = compressed(build_mlp)
    storage = torch.arange(20.0)
    model.register_buffer("head", storage[:10])
    model.register_buffer("rest", storage[10:])
    other = build_mlp()
    other.register_buffer("head", torch.zeros(10))
    other.register_buffer("rest", torch.zeros(10))
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), other)
    assert again.head.tolist() == list(range(10))
    assert again.rest.tolist() == list(range(10, 20))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w[:3],
        lambda w: w[1:],
        lambda w: w.reshape(-1),
    ],
    ids=["transposed", "rows", "later-rows", "flat"],
)
def test_a_parameter_that_is_a_view_of_another_is_refused_with_both_names(view, tmp_path):
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False)))
    model.b.weight = nn.Parameter(view(model.a.weight.detach()))
    with pytest.raises(CheckpointError, match=r"a\.weight and b\.weight share memory, but are not the same"):
        lowrank.save(model, tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_parts_of_one_memory_that_do_not_overlap_are_saved(tmp_path):
    whole = torch.randn(8, 16)
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False)))
    model.a.weight, model.b.weight = (nn.Parameter(part) for part in (whole[:, :8], whole[:, 8:]))
    lowrank.save(model, tmp_path)
    fresh = nn.Sequential(OrderedDict(a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False)))
    loaded = lowrank.load(tmp_path, fresh)
    assert torch.equal(torch.cat([loaded.a.weight, loaded.b.weight], 1), whole)


@pytest.mark.parametrize(("part", "value"), [("codes", -128), ("scale", 0.0), ("scale", -1.0)])
def test_values_that_no_quantized_weight_has_are_refused_though_the_digests_fit(part, value, tmp_path):
    lowrank.save(lowrank.compress(build_mlp(), keep=0.9, quantize="int8"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f".{part}"))
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sealed_again(tmp_path)
    fresh = build_mlp()
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=rf"the tensor {re.escape(name)} has values that no quantized weight"
    ):
        lowrank.load(tmp_path, fresh)
    assert all(torch.equal(before[key], tensor) for key, tensor in fresh.state_dict().items())


def test_a_parameter_that_is_not_contiguous_comes_back(tmp_path):
    model = compressed(build_mlp)
    model[0].up.weight = nn.Parameter(torch.randn(8, 96).T)
    again = lowrank.load(lowrank.save(model, tmp_path / "small"), build_mlp())
    assert torch.equal(again[0].up.weight, model[0].up.weight)


def test_a_dense_model_is_saved_and_loaded_too(tmp_path):
    model = build_mlp()
    again = lowrank.load(lowrank.save(model, tmp_path / "dense"), build_mlp())
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
    assert type(again[0]) is nn.Linear


def test_the_compressed_architecture_can_be_loaded_into_as_well(saved):
    model = compressed(build_mlp)
    with torch.no_grad():
        model[0].down.weight.zero_()
    assert lowrank.load(saved, model)[0].down.weight.abs().sum() > 0


def test_frozen_parameters_of_the_given_model_stay_frozen(saved):
    model = build_mlp()
    model[0].requires_grad_(False)
    again = lowrank.load(saved, model)
    assert not any(p.requires_grad for p in again[0].parameters())
    assert all(p.requires_grad for p in again[2].parameters())


def test_loading_returns_the_given_model_with_its_ranks_and_errors(saved):
    model = build_mlp()
    again = lowrank.load(saved, model)
    assert again is model
    original = compressed(build_mlp)
    assert [(m.rank, m.relative_error) for m in again if isinstance(m, LowRankLinear)] == [
        (m.rank, m.relative_error) for m in original if isinstance(m, LowRankLinear)
    ]


def test_saving_twice_writes_the_same_bytes(tmp_path):
    model = compressed(Mixed)
    first = contents(lowrank.save(model, tmp_path / "a"))
    again = lowrank.load(tmp_path / "a", Mixed().eval())
    assert contents(lowrank.save(again, tmp_path / "b")) == first


# --- what is damaged is refused by name


def test_a_newer_format_is_refused(saved):
    edit(saved, lambda data: data.update(format=99))
    assert_refused(saved, "lowrank.json", "format 99", "newer")


def test_a_newer_plan_is_refused(saved):
    edit(saved, lambda data: data["plan"].update(format=99))
    assert_refused(saved, "lowrank.json", "format 99", "newer")


@pytest.mark.parametrize(
    "keep", [0, 4, 100, 0.5, -1], ids=["empty", "4-bytes", "header", "half", "one-byte-short"]
)
def test_a_truncated_file_is_refused(saved, keep):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert_refused(saved, str(file))


def tensor_place(file: Path, name: str) -> int:
    """Return where in ``file`` the data of a tensor starts."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]


@pytest.mark.parametrize("name", ["0.up.weight", "2.down.weight", "2.up.bias"])
def test_a_flipped_bit_is_refused_with_the_name_of_the_tensor(saved, name):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[tensor_place(file, name)] ^= 1
    file.write_bytes(data)
    assert_refused(saved, str(file), name)


def test_a_changed_dtype_in_the_header_is_refused_with_the_name_of_the_tensor(saved):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["0.up.weight"]["dtype"] = "I32"
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    file.write_bytes(data[:8] + text + data[8 + length :])
    assert_refused(saved, str(file), "0.up.weight")


def test_a_missing_tensor_is_refused_by_name(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["0.down.weight"]
    save_file(tensors, file, metadata=METADATA)
    assert_refused(saved, str(file), "0.down.weight")


def test_an_extra_tensor_is_refused_by_name(saved):
    file = saved / "model.safetensors"
    save_file({**load_file(file), "intruder": torch.zeros(2)}, file, metadata=METADATA)
    assert_refused(saved, str(file), "intruder")


def test_a_missing_tensor_file_is_refused(saved):
    (saved / "model.safetensors").unlink()
    assert_refused(saved, str(saved / "model.safetensors"))


WRONG_ARCHITECTURES = {
    "other-width": (
        lambda: nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 64)),
        ": 0: the plan is for",
    ),
    "another-layer": (lambda: nn.Sequential(*build_mlp(), nn.Linear(64, 8)), "3."),
    "a-layer-less": (lambda: nn.Sequential(nn.Linear(64, 96)), ": 2: Sequential has no such layer"),
    "no-bias": (lambda: nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 64)), "0."),
    "other-names": (
        lambda: nn.ModuleDict({"a": nn.Linear(64, 96), "b": nn.Linear(96, 64)}),
        ": 0: ModuleDict has no such layer",
    ),
    "other-rank": (lambda: lowrank.compress(build_mlp(), rank=4), ": 0: factorized already, at rank 4"),
}


@pytest.mark.parametrize(("build", "named"), WRONG_ARCHITECTURES.values(), ids=WRONG_ARCHITECTURES.keys())
def test_another_architecture_is_refused(saved, build, named):
    assert_refused(saved, str(saved), named, model=build())


def test_a_model_with_state_that_is_no_tensor_is_refused_on_loading(saved):
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"anything": 1}

    assert_refused(saved, "_extra_state", model=Extra(*build_mlp()))


@pytest.mark.parametrize("rank", [4, 10_000, 0, -3, "8", 8.5, True], ids=repr)
def test_a_rank_edited_by_hand_is_refused_with_the_file_and_the_layer(saved, rank):
    edit(saved, lambda data: data["plan"]["layers"][0].update(rank=rank))
    assert_refused(saved, str(saved), "0")


def test_a_plan_for_a_layer_that_does_not_exist_is_refused(saved):
    edit(saved, lambda data: data["plan"]["layers"][0].update(name="nowhere"))
    assert_refused(saved, str(saved), ": nowhere: Sequential has no such layer")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\ud800"], ids=lambda t: repr(t[:8])
)
def test_a_structure_file_that_is_not_json_is_refused(saved, text):
    (saved / "lowrank.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_refused(saved, str(saved / "lowrank.json"))


def sealed_again(folder: Path, change=lambda data: None) -> None:
    """Change the structure, and make its digests fit again, as anybody can."""
    file = folder / "lowrank.json"
    data = json.loads(file.read_text())
    change(data)
    data["tensors"] = {k: digest_of(t) for k, t in load_file(folder / "model.safetensors").items()}
    file.write_text(json.dumps(sealed(data)))


def test_a_changed_plan_is_refused_though_the_tensors_fit_it(saved):
    edit(saved, lambda data: data["plan"]["layers"][0].update(relative_error=0.5))
    assert_refused(saved, str(saved / "lowrank.json"), "is not as it was saved")
    sealed_again(saved)
    assert lowrank.load(saved, build_mlp())[0].relative_error == 0.5


@pytest.mark.parametrize("change", [-1, 1], ids=["older", "newer"])
def test_a_folder_of_another_version_is_refused_with_what_to_do(saved, change):
    edit(saved, lambda data: data.update(format=data["format"] + change))
    advice = "Install a newer lowrank" if change > 0 else "read it with the version that wrote it"
    assert_refused(saved, str(saved / "lowrank.json"), "has format", advice)


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
def test_impossible_fields_of_a_layer_are_refused_in_a_short_sentence(saved, field, value):
    sealed_again(saved, lambda data: data["plan"]["layers"][0].update({field: value}))
    with pytest.raises(CheckpointError, match=re.escape(str(saved))) as caught:
        lowrank.load(saved, build_mlp())
    assert len(str(caught.value)) < 500


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
def test_impossible_entries_of_a_header_are_refused_by_name(saved, change):
    file = saved / "model.safetensors"
    with_header(file, lambda header: header["0.up.weight"].update(change))
    assert_refused(saved, str(file), "0.up.weight")


def test_integers_in_place_of_numbers_are_refused_though_the_digests_fit(saved):
    with_header(saved / "model.safetensors", lambda header: header["2.up.bias"].update(dtype="I32"))
    sealed_again(saved)
    assert_refused(saved, "2.up.bias is I32", "floating-point numbers")


@pytest.mark.parametrize(
    "name", ["first.up.weight", "last.up.bias", "norm.weight", "norm.running_var", "scale"]
)
def test_nan_is_refused_by_name_wherever_it_is(name, tmp_path):
    model = compressed(Mixed)
    folder = lowrank.save(model, tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata=METADATA)
    sealed_again(folder)
    assert_refused(folder, f"the tensor {name} has NaN", model=Mixed())
    model.load_state_dict(tensors)
    with pytest.raises(CheckpointError, match=rf"the tensor {re.escape(name)} has NaN"):
        lowrank.save(model, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_mask_in_a_buffer_may_be_infinite(tmp_path):
    def build() -> nn.Module:
        model = build_mlp()
        model.register_buffer("mask", torch.full((3,), -float("inf")))
        return model

    again = lowrank.load(lowrank.save(compressed(build), tmp_path / "small"), build())
    assert again.mask.tolist() == [-float("inf")] * 3


@pytest.mark.parametrize("file", ["lowrank.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "loop", "device"])
def test_what_is_no_ordinary_file_is_refused_without_waiting(saved, file, kind):
    place = saved / file
    place.unlink()
    make = {
        "pipe": os.mkfifo,
        "directory": Path.mkdir,
        "loop": lambda p: p.symlink_to(p.name),
        "device": lambda p: p.symlink_to("/dev/zero"),
    }
    make[kind](place)
    with pytest.raises(CheckpointError, match=re.escape(str(saved))):
        lowrank.load(saved, build_mlp())


def test_links_to_files_are_followed(saved, tmp_path):
    x, expected = torch.randn(3, 64), lowrank.load(saved, build_mlp())
    for file in list(saved.iterdir()):
        file.rename(tmp_path / file.name)
        file.symlink_to(Path("..") / file.name)
    assert torch.equal(lowrank.load(saved, build_mlp())(x), expected(x))


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


def test_a_loaded_model_does_not_depend_on_the_file_any_more(saved):
    model = lowrank.load(saved, build_mlp())
    before = model[0].down.weight.clone()
    (saved / "model.safetensors").write_bytes(b"")
    assert torch.equal(model[0].down.weight, before)


def test_an_alias_of_a_tensor_that_does_not_exist_is_refused(tmp_path):
    folder = lowrank.save(compressed(Mixed), tmp_path / "small")
    edit(folder, lambda data: data["aliases"].update({"norm.num_batches_tracked": "nowhere"}))
    assert_refused(folder, "lowrank.json", "nowhere", model=Mixed())


def test_an_alias_between_a_parameter_and_a_buffer_is_refused(tmp_path):
    folder = lowrank.save(compressed(Mixed), tmp_path / "small")
    edit(folder, lambda data: data["aliases"].update({"norm.weight": "norm.running_mean"}))
    assert_refused(folder, "norm.weight", model=Mixed())


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


def test_a_folder_without_a_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"no lowrank\.json and no config\.json"):
        lowrank.load(tmp_path, build_mlp())


def test_loading_without_an_architecture_asks_for_it(saved):
    with pytest.raises(CheckpointError, match=r"load\(folder, model=MyModel\(\)\)"):
        lowrank.load(saved)


def test_the_model_must_be_a_module(saved):
    with pytest.raises(LowRankError, match="not str"):
        lowrank.load(saved, "bert")  # type: ignore[arg-type]


# --- writing is safe


def test_a_folder_with_files_is_not_overwritten_unasked(saved):
    before = contents(saved)
    with pytest.raises(CheckpointError, match=r"not empty.*overwrite"):
        lowrank.save(build_mlp(), saved)
    assert contents(saved) == before


def test_overwriting_replaces_the_checkpoint_and_leaves_other_files(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    model = compressed(Mixed)
    lowrank.save(model, saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"
    assert not (saved / "model-00001-of-00002.safetensors").exists()
    x = example_input(model)
    assert torch.equal(lowrank.load(saved, Mixed().eval())(x), model(x))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


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
def test_an_interrupt_while_tensors_are_written_leaves_the_old_folder_whole(saved, monkeypatch, failure):
    before = contents(saved)

    def interrupted(tensors, file, metadata):
        Path(file).write_bytes(b"half a file")
        raise failure

    monkeypatch.setattr("lowrank.checkpoint.checkpoint.save_file", interrupted)
    with pytest.raises(failure):
        lowrank.save(compressed(Mixed), saved, overwrite=True)
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("failing_call", [1, 2], ids=["moving-the-old-away", "moving-the-new-in"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failure_while_folders_are_exchanged_leaves_the_old_folder_whole(
    saved, monkeypatch, failure, failing_call
):
    before = contents(saved)
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise failure("stopped")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((KeyboardInterrupt, CheckpointError), match="stopped"):
        lowrank.save(compressed(Mixed), saved, overwrite=True)
    assert len(calls) >= failing_call
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupt_while_a_new_folder_is_written_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank.checkpoint.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowrank.save(build_mlp(), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(CheckpointError, match=r"_extra_state.*dict.*not a tensor"):
        lowrank.save(Extra(*build_mlp()), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_model_without_data_is_refused_by_name(tmp_path):
    with torch.device("meta"):
        model = build_mlp()
    with pytest.raises(CheckpointError, match=r"0\.weight.*meta device"):
        lowrank.save(model, tmp_path / "small")


def test_nothing_in_the_library_unpickles():
    sources = list(Path(lowrank.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    pickling = re.compile(
        r"torch\.(load|save)\(|^\s*(import|from) (pickle|dill|joblib|cloudpickle)|weights_only", re.M
    )
    assert {
        str(file): pickling.findall(file.read_text()) for file in sources if pickling.search(file.read_text())
    } == {}


def test_overwriting_keeps_every_file_that_is_no_part_of_the_checkpoint(tmp_path):
    folder = lowrank.save(compressed(build_mlp), tmp_path / "small")
    (folder / "my_embeddings.safetensors").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("a stale shard")
    lowrank.save(compressed(build_mlp), folder, overwrite=True)
    assert (folder / "my_embeddings.safetensors").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "layer",
    [(nn.Linear, 64, 0), (nn.Linear, 0, 64), (nn.Embedding, 0, 8), (nn.Embedding, 8, 0)],
    ids=["no-outputs", "no-inputs", "no-rows", "no-columns"],
)
def test_layers_without_elements_are_saved_and_loaded(tmp_path, layer):
    build = partial(*layer)
    model = nn.Sequential(nn.Linear(64, 64), build())
    lowrank.compress(model, rank=4, targets=["0"])
    lowrank.save(model, tmp_path / "x")
    again = lowrank.load(tmp_path / "x", nn.Sequential(nn.Linear(64, 64), build()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    lowrank.report(again)


@pytest.mark.parametrize("name", ["é" * 300, "a/" * 3000], ids=["long", "deep"])
def test_a_name_that_is_too_long_is_no_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no lowrank\.json and no config\.json here"):
        lowrank.load(name)
    with pytest.raises(CheckpointError, match=r"cannot be written|too long"):
        lowrank.save(nn.Sequential(nn.Linear(8, 8)), name)

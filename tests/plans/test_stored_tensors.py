"""What a planned layer consists of: one list, which all that stores, prices and checks weights reads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank.errors import CheckpointError
from lowrank.files.integrity import digest_of, sealed
from lowrank.linalg import schemes
from lowrank.linalg.schemes import StorageScheme, register_storage_scheme
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.stored_tensors import modules_of, tensors_of


class Ternary(StorageScheme):
    """The signs of the large elements, and one scale per row: the whole of what a new scheme has to say."""

    name = "ternary"

    def quantize(
        self, weight: Tensor, group_size: int | None, feedback: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        codes = weight.sign() * (weight.abs() > 0.7 * weight.abs().mean(1, keepdim=True))
        scale = (weight * codes).sum(1, keepdim=True) / codes.abs().sum(1, keepdim=True).clamp(min=1)
        return codes.to(torch.int8), scale

    def requantize(self, weight: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
        return (weight / scale).round().clamp(-1, 1).to(torch.int8)

    def are_possible_codes(self, codes: Tensor) -> bool:
        return int(codes.abs().amax()) <= 1


@pytest.fixture(autouse=True)
def ternary(monkeypatch):
    monkeypatch.setattr(schemes, "STORAGE_SCHEMES", dict(schemes.STORAGE_SCHEMES))
    register_storage_scheme(Ternary())


def model_of() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()


def test_a_scheme_that_is_registered_in_one_place_is_saved_and_loaded(tmp_path):
    small = lowrank.compress(model_of(), rank=8, quantize="ternary")
    assert small[0].down.scheme.name == "ternary"
    again = lowrank.load(lowrank.save(small, tmp_path / "small"), model_of())
    x = torch.randn(3, 64)
    assert torch.equal(again(x), small(x))


def test_such_a_scheme_is_priced_and_reported():
    stored = sum(p.nbytes for p in lowrank.quantize(model_of(), "ternary").state_dict().values())
    decided = lowrank.plan(model_of(), max_bytes=stored - 1000, quantize="ternary")
    small = lowrank.apply(model_of(), decided)
    told = lowrank.report(small)
    assert told.checkpoint_bytes <= stored - 1000 + 4096  # the header of the file
    assert {weight.scheme for weight in told.quantized} == {"ternary"}
    assert {weight.runs_on for weight in told.quantized} == {"dequantized"}
    assert "ternary" in str(told) and "ternary" in str(decided)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("codes", lambda codes: codes * 3, "values that no quantized weight has"),
        ("codes", lambda codes: codes.to(torch.int32), "must be I8"),
        ("codes", lambda codes: codes[:-1].contiguous(), "has shape"),
        ("scale", lambda scale: scale / 0, "infinite|values that no"),
    ],
    ids=["impossible", "dtype", "shape", "infinite"],
)
def test_damage_to_what_such_a_scheme_stores_is_refused(tmp_path, part, change, message):
    folder = lowrank.save(lowrank.quantize(model_of(), "ternary"), tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"0.{part}"] = change(tensors[f"0.{part}"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    structure = json.loads((folder / "lowrank.json").read_text())
    structure["tensors"] = {name: digest_of(tensor) for name, tensor in tensors.items()}
    del structure["digest"]
    (folder / "lowrank.json").write_text(json.dumps(sealed(structure)))
    with pytest.raises(CheckpointError, match=rf"0\.{part}.*({message})"):
        lowrank.load(folder, model_of())


def test_an_unknown_scheme_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    folder = lowrank.save(lowrank.quantize(model_of(), "ternary"), tmp_path / "small")
    monkeypatch.undo()  # as in a program that has not registered it
    with pytest.raises(CheckpointError, match="known schemes are 'int8' and 'int4'"):
        lowrank.load(folder, model_of())


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "ternary"])
@pytest.mark.parametrize("how", ["factors", "correction", "whole"])
def test_the_list_of_parts_is_what_a_compressed_model_has(quantize, how):
    if how == "correction" and quantize is None:
        pytest.skip("nothing to correct")
    if how == "whole":
        small = lowrank.quantize(model_of(), quantize or "int8", on_missing_kernel="allow")
    else:
        asked = {"quantize": quantize, "correction": how == "correction", "on_missing_kernel": "allow"}
        small = lowrank.compress(model_of(), rank=32 if how == "factors" else 8, **asked)
    from lowrank.inspection.targets import structure

    found = {name: tensor for name, tensor in small.state_dict().items() if not name.endswith("bias")}
    listed = tensors_of(structure(small))
    assert {name: part.shape for name, part in listed.items()} == {
        n: tuple(t.shape) for n, t in found.items()
    }
    for name, part in listed.items():
        assert part.dtype in (None, found[name].dtype)


def test_a_layer_that_uses_another_s_factor_has_none_of_its_own():
    layer = LayerPlan("key", "linear", 64, 64, True, rank=8, shares_down_with="query")
    assert [part.name for part in modules_of(layer).values()] == ["key.up"]
    assert modules_of(LayerPlan("head", "linear", 64, 99, False, tied_to="embed")) == {}

"""Models that are saved, folders that are changed by hand, and how both are compared."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank import CheckpointError
from lowrank.files.folders import staged
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


def edit(folder: Path, change) -> None:
    file = folder / "lowrank.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def assert_refused(folder: Path, *parts: str, model: nn.Module | None = None) -> None:
    """Loading raises a CheckpointError whose message has every part, and the model is as before."""
    model = build_mlp() if model is None else model
    before = snapshot(model)
    every_part = "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)
    with pytest.raises(CheckpointError, match=every_part):
        lowrank.load(folder, model)
    assert snapshot(model) == before


def sealed_again(folder: Path, change=lambda data: None) -> None:
    """Change the structure, and make its digests fit again, as anybody can."""
    file = folder / "lowrank.json"
    data = json.loads(file.read_text())
    change(data)
    data["tensors"] = {k: digest_of(t) for k, t in load_file(folder / "model.safetensors").items()}
    file.write_text(json.dumps(sealed(data)))


WORK = ".lowrank-save"


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


WRITTEN = ["README.md", "lowrank.json", "model.safetensors"]
"""What `lowrank.save` writes for a module."""


def linear(*sizes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(*sizes))

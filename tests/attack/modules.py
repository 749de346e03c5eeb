"""Classes and builders of the zoo's modules: all that a module of PyTorch may have, in the smallest form."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear


def mlp(*widths: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return linear layers between ``widths``, with GELU between them."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer, bias, dtype=dtype), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def filled(value: float) -> Callable[[], nn.Module]:
    """Return what builds an MLP whose second weight is constant."""

    def make() -> nn.Module:
        model = mlp(24, 32, 16, 24)
        nn.init.constant_(model[2].weight, value)  # type: ignore[arg-type]
        return model

    return make


def scaled(factor: float, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    """Return what builds an MLP whose second weight is multiplied by ``factor``."""

    def make() -> nn.Module:
        model = mlp(24, 32, 16, 24)
        model[2].weight.data *= factor  # type: ignore[union-attr,operator]
        return model.to(dtype)

    return make


class Blocks(nn.Module):
    """Three residual blocks that read one stream; queries, keys and values read the same input."""

    def __init__(self, width: int = 24, heads: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 5) if heads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    """Attention over the batch's second dimension, if it has one, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = self.q(y) @ self.k(y).transpose(-1, -2)
        x = x + self.o(scores.softmax(-1) @ self.v(y))
        return x + self.down(gelu(self.up(x)))


class Nested(nn.Module):
    """Layers in lists in dicts in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict(
            {"a": nn.ModuleList([nn.Linear(24, 24), mlp(24, 32, 24)]), "b.c".replace(".", "_"): mlp(24, 20)}
        )
        self.parts = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(24, 24)))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts(x)
        for layer in self.inner["a"]:  # type: ignore[union-attr]
            x = layer(x).relu()
        return self.inner["b_c"](x)


class Twice(nn.Module):
    """The same layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.between = nn.Linear(24, 24)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x).relu()).relu())


class Tied(nn.Module):
    """Layers with one weight, or with one bias, or with equal weights."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(24, 24) for _ in range(3))
        if what == "weight":
            self.b.weight = self.a.weight
        elif what == "bias":
            self.b.bias = self.a.bias
        elif what == "copies":
            self.b.weight.data = self.a.weight.data.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Language(nn.Module):
    """A table, layers, and a head; perhaps with one weight."""

    def __init__(self, tied: bool, bias: bool = False, **table: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24, **table)
        self.layers = mlp(24, 32, 24)
        self.lm_head = nn.Linear(24, 40, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.layers(self.embed(ids)))


class Bag(nn.Module):
    """A bag of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 24, mode="mean")
        self.layers = mlp(24, 32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.bag(ids))


class Buffers(nn.Module):
    """Buffers of all kinds: integers, booleans, not saved, shared, empty, and without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(24, 32, 24)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False] * 12))
        self.register_buffer("scale", torch.ones(24), persistent=False)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("nothing", None)
        self.register_buffer("also_mask", self.mask)
        self.extra = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * self.scale * self.mask) + self.extra


class Reader(nn.Module):
    """Reads the weight of a layer by value, and calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(linear(x, self.read.weight, self.read.bias).relu())


class Recurrent(nn.Module):
    """An LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(24, 16, batch_first=True), mlp(16, 24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


class Attention(nn.Module):
    """PyTorch's attention, which reads the weight of its output layer by value."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.layers = mlp(24, 32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.attention(x, x, x)[0])


class Pair(nn.Module):
    """A bilinear layer beside linear ones; the outputs are a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.layers = nn.Bilinear(24, 24, 8), mlp(24, 32, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bilinear(x, x), self.layers(x)


class OwnLinear(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


class Named(nn.Module):
    """Layers whose names are those of parts of this library, of heads, or no Python names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.base = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.add_module("with space", nn.Linear(24, 24))
        self.add_module("[0-9]*", nn.Linear(24, 24))
        self.classifier = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).relu()
        return x


class Unused(nn.Module):
    """A layer that is never called, one that is called in training only, and one on no path to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never, self.late, self.aside = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        x = self.used(x)
        return self.late(x) if self.training else x


def pass_through(module: nn.Module, *args: Any) -> None:
    """Serve as a hook of any kind that changes nothing; known by name, so that it pickles."""


def with_hooks(model: nn.Module) -> None:
    """Register a hook of each kind on the first layer."""
    layer = model[0]  # type: ignore[index]
    layer.register_forward_hook(pass_through)
    layer.register_forward_pre_hook(pass_through)
    layer.register_full_backward_hook(pass_through)
    layer.register_state_dict_pre_hook(pass_through)
    layer.register_load_state_dict_pre_hook(pass_through)
    layer.register_load_state_dict_post_hook(pass_through)


def with_own_forward() -> nn.Module:
    """Build an MLP with the forward of the first layer replaced on the instance."""
    model = mlp(24, 32, 16)
    model[0].forward = nn.Linear(24, 32).forward  # type: ignore[method-assign]
    return model


def with_short_rows(model: nn.Module) -> None:
    """Look all rows up, which shortens those beyond the norm; they would be by the first call otherwise."""
    model(torch.arange(40)[None])


def with_gradients(model: nn.Module) -> None:
    """Leave gradients, as a training run does."""
    model.train()(torch.randn(3, 24)).square().mean().backward()


def frozen(model: nn.Module, count: int = 100) -> None:
    """Freeze the first parameters."""
    for parameter in list(model.parameters())[:count]:
        parameter.requires_grad_(False)


def in_inference_mode() -> nn.Module:
    """Build an MLP whose parameters are inference tensors."""
    with torch.inference_mode():
        return mlp(24, 32, 24)


def views() -> nn.Module:
    """Build an MLP whose weights are parts of one flat tensor, one of them transposed."""
    model = mlp(24, 32, 24)
    flat = torch.randn(2 * 24 * 32) / 5
    model[0].weight = nn.Parameter(flat[: 24 * 32].view(24, 32).T)  # type: ignore[union-attr]
    model[2].weight = nn.Parameter(flat[24 * 32 :].view(24, 32))  # type: ignore[union-attr]
    return model


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """Return what builds an MLP with one parametrized layer."""
    return lambda: nn.Sequential(
        norm(nn.Linear(24, 32)), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 24)
    )


def low_rank(rows: int, columns: int, rank: int) -> nn.Module:
    """Build a layer whose weight has a lower rank than its shape allows, between two others."""
    model = mlp(columns, columns, rows, columns)
    model[2].weight.data = torch.randn(rows, rank) @ torch.randn(rank, columns)  # type: ignore[union-attr]
    return model


def orthogonal() -> nn.Module:
    """Build an MLP whose weights have equal singular values."""
    model = mlp(24, 24, 24)
    nn.init.orthogonal_(model[0].weight)  # type: ignore[arg-type]
    nn.init.eye_(model[2].weight)  # type: ignore[arg-type]
    return model


def normalized() -> nn.Module:
    """Build layers with all kinds of norms and dropout between them."""
    norms = nn.BatchNorm1d(32), nn.Dropout(0.3)
    return nn.Sequential(nn.Linear(24, 32), *norms, nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 24))


def convolutional() -> nn.Module:
    """Build convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(-1, (2, 12)), nn.Conv1d(2, 4, 3, padding=1), nn.Flatten(-2), mlp(48, 16, 8)
    )


class Cast(nn.Module):
    """Casts to float64, and has a layer of that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.double())


def pretrained(family: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what builds a tiny model of transformers."""

    def make() -> nn.Module:
        import transformers as hf

        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        small |= {"vocab_size": 40, "max_position_embeddings": 32}
        if family == "gpt2":
            return hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=40,
                    n_positions=32,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
        if family == "t5":
            sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
            return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))
        if family == "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_key_value_heads=1, **options))
        if family == "classifier":
            return hf.BertForSequenceClassification(hf.BertConfig(**small))
        return hf.BertModel(hf.BertConfig(**small))

    return make


def conv1d() -> nn.Module:
    """Build a layer of transformers' Conv1D, which stores its weight transposed, and a linear one."""
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(32, 24), nn.ReLU(), nn.Linear(32, 24))

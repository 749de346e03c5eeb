"""Some 60 small modules, with whatever a module of PyTorch may have: `ZOO`, by name.

Each is built the same every time, so that a second one is the architecture that a checkpoint is loaded into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from modules import (
    Attention,
    Bag,
    Blocks,
    Buffers,
    Cast,
    Language,
    Named,
    Nested,
    OwnLinear,
    Pair,
    Reader,
    Recurrent,
    Tied,
    Twice,
    Unused,
    conv1d,
    convolutional,
    filled,
    frozen,
    in_inference_mode,
    low_rank,
    mlp,
    normalized,
    normed,
    orthogonal,
    pretrained,
    scaled,
    views,
    with_gradients,
    with_hooks,
    with_own_forward,
    with_short_rows,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lowrank

Batch = Any
"""What a module is called with: a tensor, or a dict of tensors."""


@dataclass(frozen=True)
class Specimen:
    """One module of the zoo.

    Args:
        name: For messages.
        dense: Builds it, the same each time, before anything is done to it.
        batch: Makes a batch of so many rows.
        prepare: What is done to the dense one: compressed, hooked, trained.
        weight: How often it is taken, beside the others.
        pickles: Whether PyTorch can pickle it; parametrized modules cannot be.
        runs: Whether it can be called as it is.
        trains: Whether a step of SGD can be made in its dtype.
        saves: Whether its tensors are finite, since others are refused.
    """

    name: str
    dense: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    prepare: Callable[[nn.Module], object] = lambda model: None
    weight: float = 1.0
    pickles: bool = True
    runs: bool = True
    trains: bool = True
    saves: bool = True

    def architecture(self) -> nn.Module:
        """Return the dense module, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.dense().eval()

    def build(self) -> nn.Module:
        """Return the module as it enters the attack."""
        model = self.architecture()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.prepare(model)
        return model


ZOO: dict[str, Specimen] = {}


def add(
    name: str,
    dense: Callable[[], nn.Module],
    width: int = 24,
    batch: Callable[[int], Batch] | None = None,
    **options: Any,
) -> None:
    """Add a module that reads vectors of ``width`` elements, or what ``batch`` makes."""
    ZOO[name] = Specimen(name, dense, batch or vectors(width), **options)


def vectors(
    width: int, dtype: torch.dtype = torch.float32, tokens: tuple[int, ...] = ()
) -> Callable[[int], Tensor]:
    """Return what makes batches of random vectors, or of sequences of ``tokens`` of them."""

    def make(rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, *tokens, width, generator=generator, dtype=torch.float32).to(dtype)

    return make


def token_ids(vocabulary: int, length: int = 6) -> Callable[[int], Tensor]:
    """Return what makes batches of token ids."""

    def make(rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        return torch.randint(1, vocabulary, (rows, length), generator=generator)

    return make


def with_mask(vocabulary: int, length: int = 6, **more: bool) -> Callable[[int], dict[str, Tensor]]:
    """Return what makes batches for a transformers model; the last row ends in padding."""

    def make(rows: int) -> dict[str, Tensor]:
        ids = token_ids(vocabulary, length)(rows)
        mask = torch.ones_like(ids)
        mask[-1, -2:] = 0
        return {
            "input_ids": ids,
            "attention_mask": mask,
            **({"decoder_input_ids": ids[:, :3]} if more else {}),
        }

    return make


def compressed(**budget: Any) -> Callable[[nn.Module], object]:
    """Return what compresses a module of the zoo."""
    return lambda model: lowrank.compress(model, **budget)


def quantized(scheme: str, **options: Any) -> Callable[[nn.Module], object]:
    """Return what codes a module of the zoo."""
    return lambda model: lowrank.quantize(model, scheme, **options)


def _half(dtype: torch.dtype) -> dict[str, Any]:
    return {"batch": vectors(24, dtype)}


sequences = vectors(24, tokens=(5,))

add("mlp", lambda: mlp(24, 32, 16), weight=3)
add("deep", lambda: mlp(16, 16, 16, 16, 16, 16), 16, weight=2)
add("without bias", lambda: mlp(24, 32, 24, bias=False))
add("one input", lambda: mlp(1, 32, 24), 1)
add("one output", lambda: mlp(24, 32, 1))
add("one unit", lambda: nn.Sequential(nn.Linear(1, 1)), 1)
add("no outputs", lambda: mlp(24, 16, 0))
add("odd", lambda: mlp(17, 13, 7, 3), 17)
add("wide and tall", lambda: mlp(3, 48, 3, 48), 3)
add("float16", lambda: mlp(24, 32, 16, dtype=torch.float16), **_half(torch.float16), weight=2, trains=False)
add("bfloat16", lambda: mlp(24, 32, 16, dtype=torch.bfloat16), **_half(torch.bfloat16), weight=2)
add("float64", lambda: mlp(24, 32, 16, dtype=torch.float64), **_half(torch.float64))
add("two dtypes", lambda: nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)).append(Cast()))
add("nested", Nested)
add("used twice", Twice)
add("tied weights", lambda: Tied("weight"))
add("tied biases", lambda: Tied("bias"))
add("equal weights", lambda: Tied("copies"))
add("frozen", lambda: mlp(24, 32, 16), prepare=frozen)
add("half frozen", lambda: mlp(24, 32, 16), prepare=lambda model: frozen(model, 1))
add("hooks", lambda: mlp(24, 32, 24), prepare=with_hooks)
add("buffers", Buffers)
add("weight norm", normed(parametrizations.weight_norm), pickles=False)
add("spectral norm", normed(parametrizations.spectral_norm), pickles=False)
add("norms and dropout", normalized)
add("training", normalized, prepare=lambda model: model.train())
add("gradients", lambda: mlp(24, 32, 24), prepare=with_gradients)
add("convolution", convolutional)
add("recurrent", Recurrent, batch=sequences)
add("attention", Attention, batch=sequences)
add("encoder layer", lambda: nn.TransformerEncoderLayer(24, 2, 32, batch_first=True), batch=sequences)
add("blocks", Blocks, batch=sequences, weight=4)
add("blocks and a head", lambda: Blocks(16, heads=True), 16, batch=vectors(16, tokens=(5,)), weight=2)
add("table", lambda: Language(False, padding_idx=0), batch=token_ids(40), weight=2)
add("table with a norm", lambda: Language(False, max_norm=1.0), batch=token_ids(40), prepare=with_short_rows)
add("sparse table", lambda: Language(False, sparse=True), batch=token_ids(40))
add("tied head", lambda: Language(True), batch=token_ids(40), weight=2)
add("tied head and bias", lambda: Language(True, bias=True, padding_idx=-1), batch=token_ids(40))
add("bag", Bag, batch=token_ids(40))
add("bilinear", Pair)
add("subclass", lambda: nn.Sequential(OwnLinear(24, 32), nn.Linear(32, 24)))
add("reads by value", Reader)
add("not called", lambda: nn.Sequential(nn.LazyLinear(24), nn.Linear(24, 24)), runs=False)
add("strange names", Named)
add("unused", Unused)
add("own forward", with_own_forward)
add("zeros", filled(0.0))
add("constant", filled(0.25))
add("nan", filled(float("nan")), saves=False)
add("infinite", filled(float("inf")), saves=False)
add("large", scaled(1e12))
add("small", scaled(1e-12))
add("large float16", scaled(1e3, torch.float16), **_half(torch.float16), trains=False)
add("low rank", lambda: low_rank(32, 24, 3))
add("orthogonal", orthogonal)
add("views", views)
add("in inference mode", in_inference_mode, trains=False)
add("no linear layer", lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(24)))
add("nothing", nn.Sequential)
add("itself linear", lambda: nn.Linear(24, 32))
add("itself a table", lambda: nn.Embedding(40, 24), batch=token_ids(40))
add("on meta", lambda: mlp(24, 32, 24).to("meta"), runs=False, trains=False)
add("factorized", lambda: mlp(24, 32, 24), prepare=compressed(rank=4), weight=2)
add("int8", lambda: mlp(24, 32, 24), prepare=quantized("int8"), weight=2)
add("int4", lambda: mlp(32, 32, 64), 32, prepare=quantized("int4", on_missing_kernel="allow"))
add("factorized and int8", lambda: mlp(24, 32, 24), prepare=compressed(rank=4, quantize="int8"), weight=2)
add(
    "corrected",
    lambda: mlp(32, 32, 64),
    32,
    prepare=compressed(rank=4, quantize="int4", correction=True, on_missing_kernel="allow"),
)
add(
    "shared factors",
    Blocks,
    batch=sequences,
    prepare=compressed(rank=4, share="layers", targets=["*.q", "*.o"]),
)
add("tied int8", lambda: Language(True), batch=token_ids(40), prepare=quantized("int8"))
add(
    "factorized table",
    lambda: Language(True),
    batch=token_ids(40),
    prepare=compressed(rank=4, targets=["embed"]),
)


def _pretrained() -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "BERT", "bert", {}
    yield "BERT classifier", "classifier", {}
    yield "GPT-2", "gpt2", {}
    yield "Llama", "llama", {"tie_word_embeddings": False}
    yield "tied Llama", "llama", {"tie_word_embeddings": True}
    yield "T5", "t5", {}


for _name, _family, _options in _pretrained():
    _batch = with_mask(40, decoder=True) if _family == "t5" else with_mask(40)
    add(_name, pretrained(_family, **_options), batch=_batch, weight=0.6)


add("Conv1D", conv1d)

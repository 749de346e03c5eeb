"""What calibration learned about each layer: moments of its inputs, and a metric of its outputs.

Plain sums over tokens in float64, so that statistics of parts of the data add up to those of the
whole. They answer every metric and every budget without another forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank.arguments import accepts, choice, flag, instance, number, path, refused, text, whole
from lowrank.calibration.embeddings import EmbeddingStatistics
from lowrank.calibration.held_out_errors import HELD_OUT_SUMS, HeldOutErrors, added, coherences
from lowrank.calibration.moments import Gradients, Moments
from lowrank.errors import CheckpointError, LowRankError, StatsError
from lowrank.files.folders import settle, staged
from lowrank.files.integrity import check_seal, digest_of, load_tensors, read_document, sealed
from lowrank.files.safetensors_header import METADATA
from lowrank.inspection.fingerprints import Fingerprint
from lowrank.linalg import Diagonal, Metric

STATS_FORMAT = 4
"""Version of the folder written by `Stats.save`, the only one that is read."""

_TENSORS, _STRUCTURE = "stats.safetensors", "stats.json"


@dataclass(frozen=True, eq=False)
class Stats:
    """Calibration statistics of a model, from `lowrank.calibrate`.

    Args:
        fingerprint: What they were made from. Statistics of another model are refused.
        inputs: Moments by input; layers that read the same tensor share them.
        sources: ``{layer name: key of inputs}``.
        gradients: The outputs' metric by layer name; empty without a loss.
        tokens: Real tokens seen.
        terms: Independent terms of the objective: samples, or tokens of a language model.
        held_out: By layer, how trial factorizations fared on tokens that they had not seen.
        embeddings: By name of an embedding, how its rows are used.
    """

    fingerprint: Fingerprint
    inputs: Mapping[str, Moments]
    sources: Mapping[str, str]
    gradients: Mapping[str, Gradients] = field(default_factory=dict)
    tokens: int = 0
    terms: int = 0
    held_out: Mapping[str, HeldOutErrors] = field(default_factory=dict)
    embeddings: Mapping[str, EmbeddingStatistics] = field(default_factory=dict)

    def __contains__(self, layer: object) -> bool:
        return layer in self.sources or layer in self.embeddings

    def __repr__(self) -> str:
        return (
            f"Stats({len(self.sources)} layers, {len(self.inputs)} distinct inputs, "
            f"{len(self.gradients)} with gradients, {self.tokens:,} tokens, {self.bytes / 1e6:.1f} MB)"
        )

    @property
    def bytes(self) -> int:
        """Memory that the sums take."""
        tensors = [t for m in self.inputs.values() for t in (m.total, m.products)]
        tensors += [g.products for g in self.gradients.values()]
        tensors += [tensor for embedding in self.embeddings.values() for tensor in embedding.tensors.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @accepts(layer=text(StatsError))
    def moments(self, layer: str) -> Moments:
        """Return the moments of what ``layer`` reads; raises `StatsError` if it was never called."""
        if layer not in self.sources:
            raise StatsError(f"{layer}: the statistics do not have this layer. Calibrate this model again.")
        return self.inputs[self.sources[layer]]

    @accepts(layer=text(StatsError), metric=text(StatsError))
    def is_diagonal(self, layer: str, metric: str) -> bool:
        """Tell whether ``metric`` knows only a diagonal of ``layer``'s moments, since it is very wide."""
        if layer in self.embeddings:
            return False
        coarse = self.moments(layer).products.ndim == 1 and metric in ("inputs", "loss")
        return coarse or (metric == "loss" and self.gradients[layer].products.ndim == 1)

    def best_metric(self) -> str:
        """Name the metric that makes the most of what is here."""
        felt = self.gradients or any(
            embedding.gradients is not None for embedding in self.embeddings.values()
        )
        return "loss" if felt else "inputs"

    @accepts(layer=text(StatsError), metric=text(StatsError))
    def lacks(self, layer: str, metric: str) -> str | None:
        """Return why ``layer`` cannot be measured by ``metric``, or ``None``."""
        if layer in self.embeddings:
            return self.embeddings[layer].lacks(metric)
        if layer not in self.sources:
            return "was not called during calibration"
        if not self.moments(layer).weight:
            return "read no token during calibration"
        if metric == "loss" and (layer not in self.gradients or not self.gradients[layer].tokens):
            return "no gradient of the loss reached it during calibration"
        return None

    @accepts(
        layer=text(StatsError),
        metric=choice(("weight", "diagonal", "inputs", "loss"), StatsError),
        centred=flag,
    )
    def metric(self, layer: str, metric: str, centred: bool) -> Metric:
        """Return the metric of one layer, or of an embedding, whose rows weigh as often as they are read.

        Args:
            layer: Its name.
            metric: One of `lowrank.config.METRICS`.
            centred: Whether a bias will take up the mean of the error.

        Raises:
            StatsError: If the layer is not here, or has no gradients and ``"loss"`` is asked for.
        """
        if metric == "weight":
            return Metric()
        if layer in self.embeddings:
            return self.embeddings[layer].metric(metric)
        moments = self.moments(layer)
        inputs = moments.centred if centred else moments.raw
        if metric == "diagonal":
            diagonal = moments.second(centred)
            return Metric(Diagonal((diagonal if diagonal.ndim == 1 else diagonal.diagonal()).clamp(min=0)))
        if metric == "inputs":
            return Metric(inputs)
        if layer not in self.gradients:
            raise StatsError(
                f'{layer}: metric="loss" needs gradients. Calibrate with a loss that reaches it.'
            )
        return Metric(inputs, self.gradients[layer].side)

    @accepts(layer=text(StatsError))
    def loss_per_square(self, layer: str) -> float:
        """Return the factor from a squared error under ``"loss"`` to the objective's increase per term.

        To second order, a change ``δy`` of the layer's output costs ``½ Σ (gᵀδy)²``, and the squared
        error is a mean over tokens.
        """
        if layer not in self.embeddings and layer not in self.gradients:
            raise StatsError(
                f"{layer}: the statistics have no gradients of this layer. Calibrate with a loss."
            )
        tokens = self.embeddings[layer].tokens if layer in self.embeddings else self.gradients[layer].tokens
        return 0.5 * tokens / max(1, self.terms)

    @accepts(layer=text(StatsError))
    def held_out_ratio(self, layer: str) -> float:
        """Return the squared error at a quarter of the full rank, on held-out tokens over the predicted one.

        It is 1 if not known, and within 1/16 … 16.
        """
        if layer not in self.held_out:
            return 1.0
        ratios = self.held_out_ratios(layer)
        return float(ratios[len(ratios) // 4])

    @cached_property
    def _coherences(self) -> dict[str, float]:
        return coherences(self.held_out)

    @accepts(layer=text(StatsError))
    def held_out_means(self, layer: str) -> Tensor:
        """Return the squared errors of a token to expect on other data, by rank, from 0 to the full one."""
        return self.held_out[layer].means(self._coherences[layer])

    @accepts(layer=text(StatsError))
    def held_out_ratios(self, layer: str) -> Tensor:
        """Return the same over the squared errors that the statistics predict, within 1/16 … 16."""
        return self.held_out[layer].ratios(self._coherences[layer])

    @accepts(
        owner=text(StatsError),
        users=instance(Mapping, "a mapping of layer names to True or False", StatsError),
    )
    def merged(self, owner: str, users: Mapping[str, bool]) -> Stats:
        """Return statistics in which those of ``owner`` are over what all layers with its weight read.

        The mean stays the owner's: every layer's bias takes up the mean of its own error. So inputs are
        summed centred, each about its own mean; those of a layer without a bias, about zero. Where none is
        centred, the mean is that of all.

        Args:
            owner: A linear layer.
            users: By name of each layer with its weight, the owner included, whether to centre its inputs.
        """
        if owner not in users:
            raise StatsError(f"{owner}: users={list(users)} must have the owner of the weight, too.")
        sums = [(self.moments(name), centred) for name, centred in users.items()]
        weight = sum(moments.weight for moments, _ in sums)
        parts = [moments.weight * moments.second(centred) for moments, centred in sums]
        if any(part.ndim == 1 for part in parts):
            parts = [part if part.ndim == 1 else part.diagonal() for part in parts]
        products, mean = torch.stack(parts).sum(0), self.moments(owner).mean
        if not any(users.values()):
            mean = torch.stack([moments.total for moments, _ in sums]).sum(0) / max(weight, 1e-300)
        elif users[owner]:
            products = products + weight * (mean.square() if products.ndim == 1 else torch.outer(mean, mean))
        key = f"{owner} and {len(users) - 1} more"
        felt = [self.gradients[name] for name in users if name in self.gradients]
        tried = [self.held_out[name] for name in users if name in self.held_out]
        return replace(
            self,
            inputs={**self.inputs, key: Moments(weight, weight * mean, products)},
            sources={**self.sources, owner: key},
            gradients={**self.gradients, **({owner: sum(felt[1:], felt[0])} if felt else {})},
            held_out={**self.held_out, **({owner: sum(tried[1:], tried[0])} if tried else {})},
        )

    def __add__(self, other: Stats) -> Stats:
        """Add the statistics of other data for the same model.

        Raises:
            StatsError: If they are of another model or tokenizer, or know other layers.
        """
        if not isinstance(other, Stats):
            raise refused("other", other, "Stats, from calibrate(model, data)", StatsError)
        mine, its = self.fingerprint, other.fingerprint
        if (mine.layers, mine.tokenizer) != (its.layers, its.tokenizer):
            raise StatsError("Statistics of different models or tokenizers cannot be added.")
        embeddings = [
            {name: embedding.tensors.keys() for name, embedding in x.embeddings.items()}
            for x in (self, other)
        ]
        gradients = self.gradients.keys(), other.gradients.keys()
        if self.sources != other.sources or gradients[0] != gradients[1] or embeddings[0] != embeddings[1]:
            raise StatsError("The statistics know different layers. Calibrate both in the same way.")
        data = (int(mine.data, 16) + int(its.data, 16)) % 2**64
        return Stats(
            replace(mine, data=f"{data:016x}"),
            {key: moments + other.inputs[key] for key, moments in self.inputs.items()},
            self.sources,
            {name: gradients + other.gradients[name] for name, gradients in self.gradients.items()},
            self.tokens + other.tokens,
            self.terms + other.terms,
            added(self.held_out, other.held_out),
            {name: embedding + other.embeddings[name] for name, embedding in self.embeddings.items()},
        )

    @accepts(folder=path(CheckpointError), overwrite=flag)
    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``stats.safetensors`` and ``stats.json`` into ``folder``.

        Raises:
            CheckpointError: If the folder has files already, or cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for key, moments in self.inputs.items():
            tensors[f"inputs.{key}.total"] = moments.total
            tensors[f"inputs.{key}.products"] = moments.products
        for name, gradients in self.gradients.items():
            tensors[f"gradients.{name}.products"] = gradients.products
        for name, held in self.held_out.items():
            for part in HELD_OUT_SUMS:
                tensors[f"held_out.{name}.{part}"] = getattr(held, part)
        for name, embedding in self.embeddings.items():
            tensors |= {f"embeddings.{name}.{part}": tensor for part, tensor in embedding.tensors.items()}
        structure = {
            "format": STATS_FORMAT,
            "fingerprint": vars(self.fingerprint),
            "tokens": self.tokens,
            "terms": self.terms,
            "sources": dict(self.sources),
            "inputs": {key: moments.weight for key, moments in self.inputs.items()},
            "held_out": {
                name: {"tokens": held.tokens, "samples": held.samples} for name, held in self.held_out.items()
            },
            "gradients": {
                name: {field: getattr(gradients, field) for field in ("tokens", "samples", "pulled_back")}
                for name, gradients in self.gradients.items()
            },
            "embeddings": {
                name: {"parts": list(embedding.tensors), "head_tokens": embedding.head_tokens}
                for name, embedding in self.embeddings.items()
            },
        }
        structure = sealed({**structure, "tensors": {key: digest_of(t) for key, t in tensors.items()}})
        with staged(Path(folder), overwrite) as staging:
            save_file({k: t.contiguous() for k, t in tensors.items()}, staging / _TENSORS, METADATA)
            (staging / _STRUCTURE).write_text(
                json.dumps(structure, indent=2, allow_nan=False), encoding="utf-8"
            )

    @classmethod
    @accepts(folder=path(StatsError))
    def load(cls, folder: str | Path) -> Stats:
        """Read what `save` wrote.

        Raises:
            StatsError: If the folder has no statistics, or they are damaged or from a newer version.
        """
        file = Path(folder) / _STRUCTURE
        try:
            settle(Path(folder))
            structure = read_document(file, STATS_FORMAT)
            tensors = load_tensors(Path(folder) / _TENSORS, structure.get("tensors"))
        except (OSError, CheckpointError) as error:
            raise StatsError(f"{folder}: the statistics cannot be read: {error}") from error
        try:
            stats = _assembled(structure, tensors)
            check_seal(file, structure)  # only now: the checks before this one say what is wrong
            return stats
        except LowRankError as error:
            raise StatsError(f"{folder}: the statistics are damaged: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StatsError(
                f"{folder}: not statistics of lowrank, or damaged: {type(error).__name__}: {error}."
            ) from error


def nonempty_stats(name: str, value: Any) -> Stats:
    """Accept statistics that have seen something."""
    wanted = "what calibrate(model, data) returns, or Stats.load(folder)"
    stats: Stats = instance(Stats, wanted, StatsError)(name, value)
    if stats.tokens < 1:
        raise StatsError(
            f"{name}: these statistics have seen {stats.tokens} tokens. Calibrate again, on other data."
        )
    return stats


_COUNT = whole(0, 2**63 - 1, StatsError)
_SUM = number(0, error=StatsError)
_TEXT = text(StatsError)


def _assembled(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stats:
    for name, tensor in tensors.items():
        square = tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1])
        if tensor.dtype != torch.float64 or not square or not bool(tensor.isfinite().all()):
            raise ValueError(f"the tensor {name} is not a finite float64 vector or square matrix")
    inputs = {
        key: Moments(
            _SUM(f"inputs of {key}", weight),
            tensors[f"inputs.{key}.total"],
            tensors[f"inputs.{key}.products"],
        )
        for key, weight in structure["inputs"].items()
    }
    for key, moments in inputs.items():
        if moments.total.ndim != 1 or len(moments.total) != len(moments.products):
            raise ValueError(f"the sums of the input {key} are of different sizes")
    for layer, key in structure["sources"].items():
        if not isinstance(key, str) or key not in inputs:
            raise ValueError(f"layer {layer!r} reads the input {str(key)[:80]!r}, which is not there")
    gradients = {
        name: Gradients(
            _COUNT(f"tokens of {name}", entry["tokens"]),
            _COUNT(f"samples of {name}", entry["samples"]),
            tensors[f"gradients.{name}.products"],
            flag(f"pulled_back of {name}", entry["pulled_back"]),
        )
        for name, entry in structure["gradients"].items()
    }
    held = {
        name: HeldOutErrors(
            *(_COUNT(f"held-out {field} of {name}", entry[field]) for field in ("tokens", "samples")),
            *(tensors[f"held_out.{name}.{part}"] for part in HELD_OUT_SUMS),
        )
        for name, entry in structure["held_out"].items()
    }
    found = structure["fingerprint"]
    layers = {name: _TEXT(f"fingerprint of {name}", value) for name, value in found["layers"].items()}
    data = f"{int(_TEXT('data', found['data']), 16):016x}"
    return Stats(
        Fingerprint(layers, _TEXT("tokenizer", found["tokenizer"]), data),
        inputs,
        structure["sources"],
        gradients,
        _COUNT("tokens", structure["tokens"]),
        _COUNT("terms", structure["terms"]),
        held,
        _embeddings(structure, tensors),
    )


def _embeddings(
    structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, EmbeddingStatistics]:
    """Return the sums of embeddings."""
    return {
        name: EmbeddingStatistics(
            **{part: tensors[f"embeddings.{name}.{part}"] for part in entry["parts"]},
            head_tokens=_COUNT(f"head_tokens of {name}", entry["head_tokens"]),
        )
        for name, entry in structure["embeddings"].items()
    }

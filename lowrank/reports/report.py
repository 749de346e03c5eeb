"""What a model costs now and what it cost before: parameters, bytes, MACs and error per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lowrank.adapter import adapter, inspect
from lowrank.arguments import MODEL_OF, accepts, function, instance, optional
from lowrank.errors import LowRankError, PlanError
from lowrank.files.safetensors_header import safetensors_bytes
from lowrank.inspection.targets import draft
from lowrank.inspection.unplanned import with_reach
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    PivotedUp,
    QuantizedLinear,
    QuantizedModule,
    TiedLinear,
)
from lowrank.plans.formatting import format_bytes, format_table, to_json
from lowrank.plans.layer_plan import EMBEDDING, LayerPlan
from lowrank.plans.plan import Plan
from lowrank.plans.reach import UnplannedWeight, describe_reach
from lowrank.reports.evaluation import loss_increase


@dataclass(frozen=True)
class LayerReport:
    """One linear layer or factorized embedding, before and after, without its bias.

    Attributes:
        name: Module name.
        shape: ``(out, in)``.
        rank: Inner size; ``None`` for a dense layer.
        relative_error: ``‖W − LR‖ / ‖W‖`` under the metric that the layer was factorized with; ``None``
            for a dense layer, or if not known.
        parameters_before, parameters: Counts; mostly also the multiply-accumulates (MACs) per token.
        bytes_before, bytes: In the dtype that the layer computes in, and as it is stored.
        added_parameters: Of a bias that the dense layer did not have.
        scheme: How the weight or factors are quantized, such as ``"int8"``, or ``"int4 + int8"`` for a
            quantized weight with factors that correct it; ``None`` if nothing is.
        layer_type: ``"linear"``, ``"conv1d"``, or ``"embedding"``, whose rows are looked up.
        tied_to: The embedding or layer whose weight it uses; parameters and bytes are counted there, here
            none.
        macs: Multiply-accumulates per token as the layer is now; looking up takes none.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    relative_error: float | None
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    added_parameters: int = 0
    scheme: str | None = None
    layer_type: str = "linear"
    tied_to: str | None = None
    macs: int = 0

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding, whose rows are looked up."""
        return self.layer_type == EMBEDDING

    @property
    def macs_before(self) -> int:
        """Multiply-accumulates per token of the dense layer; looking up takes none."""
        return 0 if self.is_embedding else self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class QuantizedReport:
    """One weight that is stored as integers: of a layer, a factor or an embedding.

    Attributes:
        name: Module name.
        scheme: ``"int8"`` or ``"int4"``.
        elements: Of the weight.
        bytes_before, bytes: In the dtype that the layer computes in, and of codes and scales.
        runs_on: What computes with it at inference, as `QuantizedLinear.runs_on`; ``"lookup"`` for an
            embedding.
    """

    name: str
    scheme: str
    elements: int
    bytes_before: int
    bytes: int
    runs_on: str


@dataclass(frozen=True)
class Report:
    """What a model costs now, and what it cost before; prints as a table.

    Attributes:
        model: Class name.
        layers: Every linear layer, heads and dense ones included.
        parameters_before, parameters: Of the whole model, embeddings and biases included; a tied
            weight counts once.
        checkpoint_bytes_before, checkpoint_bytes: Predicted size of ``model.safetensors`` with dense layers,
            and its exact size now.
        loss_increase_predicted: Of the objective per term, by the plan; ``None`` if it has none.
        loss_increase_measured: The same as measured on data; ``None`` without data.
        quantized: Every weight that is stored as integers.
        reachable_parameters: Of ``parameters_before``, those in layers that can change, or have.
        unplanned: Those in none of the ``layers``, with the reason.
    """

    model: str
    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters: int
    checkpoint_bytes_before: int
    checkpoint_bytes: int
    loss_increase_predicted: float | None = None
    loss_increase_measured: float | None = None
    quantized: tuple[QuantizedReport, ...] = ()
    reachable_parameters: int = 0
    unplanned: tuple[UnplannedWeight, ...] = ()

    @property
    def factorized(self) -> tuple[LayerReport, ...]:
        """The layers with a rank of their own."""
        return tuple(layer for layer in self.layers if layer.rank is not None and layer.tied_to is None)

    @property
    def kept_fraction(self) -> float:
        """Parameters now over before, of the whole model."""
        return self.parameters / self.parameters_before if self.parameters_before else 1.0

    @property
    def reachable_fraction(self) -> float:
        """Parameters in layers that can change, or have, over all before."""
        return self.reachable_parameters / self.parameters_before if self.parameters_before else 1.0

    def to_json(self) -> str:
        """Return everything as JSON, with ``macs`` per token, for programs."""
        data = asdict(self)
        for layer, row in zip(self.layers, data["layers"], strict=True):
            row.update(macs_before=layer.macs_before, macs=layer.macs)
        data |= {"kept_fraction": self.kept_fraction, "reachable_fraction": self.reachable_fraction}
        return to_json(data)

    def _macs_in_words(self) -> str:
        if all(layer.macs == layer.parameters for layer in self.layers):
            return "as many MACs per token"
        now, before = (sum(getattr(x, key) for x in self.layers) for key in ("macs", "macs_before"))
        return f"{now:,} of {before:,} MACs per token"

    def __str__(self) -> str:
        header = ("layer", "out×in", "rank", "error", "parameters", "before", "kept", "bytes")
        rows = [_row(layer) for layer in self.layers]
        embeddings = [layer for layer in self.layers if layer.is_embedding]
        linear_before = sum(layer.parameters_before for layer in self.layers if layer not in embeddings)
        linear = sum(layer.parameters for layer in self.layers if layer not in embeddings)
        total = self.parameters_before
        lines = [
            describe_reach(self.model, total, self.reachable_parameters, self.unplanned),
            "",
            format_table(header, rows),
            "",
            f"{self.model}: {len(self.factorized)} of {len(self.layers)} layers factorized."
            if embeddings
            else f"{self.model}: {len(self.factorized)} of {len(self.layers)} linear layers factorized.",
            f"  linear weights  {linear:,} of {linear_before:,} parameters remain "
            f"({linear / max(1, linear_before):.1%}); {self._macs_in_words()}",
            f"  whole model     {self.parameters:,} of {self.parameters_before:,} parameters remain "
            f"({self.kept_fraction:.1%})",
            f"  checkpoint      {format_bytes(self.checkpoint_bytes)}, "
            f"dense {format_bytes(self.checkpoint_bytes_before)}",
        ]
        if embeddings:
            before, now = sum(x.parameters_before for x in embeddings), sum(x.parameters for x in embeddings)
            lines.append(f"  embeddings      {now:,} of {before:,} parameters remain ({now / before:.1%})")
        for how in sorted({(stored.scheme, stored.runs_on) for stored in self.quantized}):
            those = [stored for stored in self.quantized if (stored.scheme, stored.runs_on) == how]
            now, before = sum(stored.bytes for stored in those), sum(stored.bytes_before for stored in those)
            lines.append(
                f"  {how[0]}            {len(those)} weights in {format_bytes(now)}, "
                f"{format_bytes(before)} before ({how[1]})"
            )
        parts = {"predicted": self.loss_increase_predicted, "measured": self.loss_increase_measured}
        known = [f"{word} {value:.4g}" for word, value in parts.items() if value is not None]
        if known:
            lines.append(f"  loss increase   {', '.join(known)}")
        return "\n".join(lines)


@accepts(
    plan=optional(instance(Plan, "a Plan, from plan(model, ...)", PlanError)),
    dense=optional(instance(nn.Module, MODEL_OF)),
    tokenizer=optional(function),
)
def report(
    model: nn.Module,
    *,
    plan: Plan | None = None,
    dense: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> Report:
    """Count what ``model`` costs now, and what it cost with dense layers.

    Args:
        model: Any module, compressed or not; it is only read.
        plan: The plan that was carried out, for the loss that it predicted; a transformers model knows it.
        dense: The dense model, to measure by how much the loss has really increased.
        data: What to measure that on, as for `lowrank.calibrate`; text that calibration has not seen.
        tokenizer: A tokenizer of transformers, for data that are strings.

    Returns:
        A `Report`: print it, or take `Report.to_json`.

    Raises:
        CheckpointError: If the state dict holds something that cannot be stored.
        LowRankError: If only one of ``dense`` and ``data`` is given.

    Example:
        >>> from lowrank import compress
        >>> report(compress(nn.Sequential(nn.Linear(64, 64)), rank=8)).layers[0].parameters
        1024
    """
    seen = inspect(model)
    if (dense is None) != (data is None):
        raise LowRankError("The increase of the loss is measured with both dense= and data=.")
    drafted = with_reach(seen, draft(seen))
    layers = tuple(_describe(model, layer) for layer in drafted)
    tensors = adapter().saved_tensors(model)
    if plan is None:
        plan = adapter().recorded(model)
    quantized = tuple(
        _describe_code(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedModule)
    )
    factors = {f"{layer.name}.down" for layer in layers}
    embeddings = [stored for stored in quantized if stored.runs_on == "lookup" and stored.name not in factors]
    parameters = sum(p.numel() for p in model.parameters()) + sum(stored.elements for stored in quantized)
    added = sum(x.added_parameters for x in layers)
    added_bytes = sum(
        x.added_parameters * (x.bytes_before // x.parameters_before) for x in layers if x.added_parameters
    )
    size = safetensors_bytes(tensors)
    return Report(
        model=type(model).__name__,
        layers=layers,
        parameters_before=parameters - added + sum(x.parameters_before - x.parameters for x in layers),
        parameters=parameters,
        checkpoint_bytes_before=size
        - added_bytes
        + sum(x.bytes_before - x.bytes for x in layers)
        + sum(x.bytes_before - x.bytes for x in embeddings),
        checkpoint_bytes=size,
        loss_increase_predicted=plan.loss_increase if plan is not None else None,
        loss_increase_measured=(
            loss_increase(model, dense, data, tokenizer) if dense is not None and data is not None else None
        ),
        quantized=quantized,
        reachable_parameters=drafted.reachable_parameters,
        unplanned=drafted.unplanned,
    )


def _describe_code(name: str, module: QuantizedModule) -> QuantizedReport:
    runs_on = module.runs_on() if isinstance(module, QuantizedLinear) else "lookup"
    elements = math.prod(module.shape)
    return QuantizedReport(
        name,
        module.scheme.name,
        elements,
        elements * module.weight.element_size(),
        module.stored_bytes,
        runs_on,
    )


def _describe(model: nn.Module, layer: LayerPlan) -> LayerReport:
    module = model.get_submodule(layer.name)
    width = module.weight.element_size()  # type: ignore[operator,union-attr]
    parts: list[nn.Module] = [module]
    if isinstance(module, LowRankEmbedding):
        parts = [module.up, module.down]
    elif isinstance(module, LowRankLinear):
        own = (module.base, module.up, module.down if module.owns_down else None)
        parts = [part for part in own if part is not None]
    before = layer.dense_parameters if layer.tied_to is None or layer.was_copy else 0
    return LayerReport(
        name=layer.name,
        shape=(layer.out_features, layer.in_features),
        rank=layer.rank,
        relative_error=layer.relative_error,
        parameters_before=before,
        parameters=layer.parameters,
        bytes_before=before * width,
        bytes=sum(_stored_bytes(part) for part in parts),
        added_parameters=layer.bias_features if layer.added_bias else 0,
        scheme=_in_words(parts),
        layer_type=layer.layer_type,
        tied_to=layer.tied_to,
        macs=_count_macs(layer, module),
    )


def _count_macs(layer: LayerPlan, module: nn.Module) -> int:
    if isinstance(module, (LowRankLinear, TiedLinear)):
        return module.macs
    if layer.is_embedding:
        return (layer.rank or 0) * layer.in_features
    return math.prod(layer.kept_shape)


def _in_words(parts: Sequence[nn.Module]) -> str | None:
    """Say how the parts of a layer are stored; nothing where all are plain floating point."""
    if any(isinstance(part, PivotedUp) for part in parts):
        return "pivoted"
    if not any(isinstance(part, QuantizedModule) for part in parts):
        return None
    return " + ".join(
        dict.fromkeys(part.scheme.name if isinstance(part, QuantizedModule) else "float" for part in parts)
    )


def _stored_bytes(module: nn.Module) -> int:
    if isinstance(module, (QuantizedModule, PivotedUp)):
        return module.stored_bytes
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.numel() * weight.element_size()


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.shape[0]}×{layer.shape[1]}",
        ("dense" if layer.rank is None else str(layer.rank)) + (f" {layer.scheme}" if layer.scheme else ""),
        "" if layer.relative_error is None else f"{layer.relative_error:.4f}",
        f"{layer.parameters:,}",
        f"{layer.parameters_before:,}",
        f"{layer.parameters / max(1, layer.parameters_before):.0%}",
        format_bytes(layer.bytes),
    )

"""The formats in which a plan can store a layer: as it is, as factors, as integers, and combinations.

A format turns a layer's entry in the plan into `QuantizedWeight`s. Weights are quantized after factorizing
and never before: factors of a quantized weight would carry its rounding along. The exception is the
correction, where factors correct what a quantized weight has lost; they are int8 then, whatever the weight
is. The factor of an embedding may have a width for each group of components (`lowrank.linalg.mixed_widths`);
the other factor is int8 then, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.linalg import Scheme
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.stored_tensors import ModulePart, modules_of

INT8 = Scheme("int8")


@dataclass(frozen=True)
class StorageFormat:
    """How weights are stored, be they factorized or whole.

    Args:
        scheme: How they are quantized; ``None`` for floating point.
        correction: Whether factors correct a quantized weight, in place of replacing it.
        pivoted: Whether factors are pivoted.
    """

    scheme: Scheme | None = None
    correction: bool = False
    pivoted: bool = False

    @property
    def rank_step(self) -> int:
        """What ranks must be multiples of, so that factors are whole groups."""
        return (self.scheme.group_size or 1) if self.scheme is not None and not self.correction else 1

    @property
    def only_rank(self) -> int | None:
        """The only rank that a factorized embedding can have in this format; ``None`` for any."""
        return self.scheme.storage.columns if self.scheme is not None else None

    def quantized(
        self, layer: LayerPlan, *, shared: bool = False, calibrated: bool = False
    ) -> list[QuantizedWeight]:
        """Return the quantized weights of ``layer``, as the plan has them.

        Args:
            layer: Its entry, with the rank that it will have.
            shared: Whether other layers use its ``down``. No bias takes up the mean of its inputs then.
            calibrated: Whether there are statistics of its inputs, to scale and shift these by.
        """
        if self.scheme is None:
            return []
        others = {"up": INT8, "down": self.scheme if self.only_rank else INT8}
        by_part = others if self.correction or self.only_rank else {}
        takes_mean = {"": layer.bias, "base": False, "down": layer.has_bias and not shared, "up": False}
        return [
            _quantized(
                module,
                by_part.get(part, self.scheme),
                calibrated and part != "up" and not layer.is_embedding,
                takes_mean[part],
            )
            for part, module in modules_of(layer).items()
        ]


FLOAT = StorageFormat()
"""Weights and factors stay floating point."""

PIVOTED = StorageFormat(pivoted=True)
"""So do they, and factors are pivoted."""


def _quantized(module: ModulePart, scheme: Scheme, smooth_scale: bool, takes_mean: bool) -> QuantizedWeight:
    """Describe a weight; only integers that meet integer inputs gain from taking the inputs' mean away."""
    input_shift = smooth_scale and takes_mean and scheme.storage.rounds_inputs
    return QuantizedWeight(*module, scheme.name, scheme.group_size, smooth_scale, input_shift)


def storage_formats_of(
    quantize: str | None, group_size: int | None = None, correction: bool = False
) -> tuple[StorageFormat, ...]:
    """Return the formats that a request allows.

    Args:
        quantize: The name of a scheme, ``None`` for floating point, or ``"auto"`` for all of them.
        group_size: Elements that share a scale under ``"int4"``.
        correction: Whether factors correct quantized weights; ``"auto"`` allows that anyway.

    Raises:
        SchemeError: If the scheme is unknown.
    """
    if quantize is None:
        return (FLOAT,)
    if quantize == "auto":
        int4 = Scheme("int4", group_size)
        return FLOAT, StorageFormat(INT8), StorageFormat(int4), StorageFormat(int4, correction=True)
    return (StorageFormat(Scheme(quantize, group_size), correction),)

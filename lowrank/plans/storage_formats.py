"""The forms in which a plan can store a layer: as it is, as factors, as integers, and combinations.

A form turns a layer's entry in the plan into `QuantizedWeight`s, and these into bytes. Codes come after
factors and never before: factors of a coded weight would carry its rounding along. The exception is the
correction, where factors correct what a coded weight has lost; they are int8 then, whatever the weight is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lowrank.errors import SchemeError
from lowrank.linalg import Scheme
from lowrank.plans.plan import EMBEDDING, LayerPlan, QuantizedWeight

INT8 = Scheme("int8")


@dataclass(frozen=True)
class StorageFormat:
    """How weights are stored, be they factorized or whole.

    Args:
        scheme: How they are coded; ``None`` for floating point.
        correction: Whether factors correct a coded weight, in place of replacing it.
    """

    scheme: Scheme | None = None
    correction: bool = False

    @property
    def rank_step(self) -> int:
        """What ranks must be multiples of, so that factors are whole groups."""
        grouped = self.scheme is not None and not self.correction
        return (self.scheme.group_size or 1) if grouped and self.scheme is not None else 1

    def quantized(
        self, layer: LayerPlan, *, shared: bool = False, calibrated: bool = False
    ) -> list[QuantizedWeight]:
        """Return what is coded of ``layer``, as the plan has it.

        Args:
            layer: Its entry, with the rank that it will have.
            shared: Whether other layers use its ``down``. No bias takes up the mean of its inputs then.
            calibrated: Whether there are statistics of its inputs, to scale and centre these by.
        """
        if self.scheme is None:
            return []
        factors = INT8 if self.correction else self.scheme
        if layer.is_embedding:
            return _coded_table(layer, self.scheme if layer.rank is None else factors)
        if layer.rank is None:
            sizes = layer.out_features, layer.in_features
            return [
                _quantized_linear(
                    layer.name, layer.layer_type, sizes, layer.bias, self.scheme, calibrated, layer.bias
                )
            ]
        made = []
        if self.correction:
            sizes = layer.out_features, layer.in_features
            made.append(
                _quantized_linear(
                    f"{layer.name}.base", "linear", sizes, False, self.scheme, calibrated, False
                )
            )
        if layer.shares_down_with is None:
            sizes = layer.rank, layer.in_features
            input_shift = layer.has_bias and not shared
            made.append(
                _quantized_linear(
                    f"{layer.name}.down", "linear", sizes, False, factors, calibrated, input_shift
                )
            )
        sizes = layer.out_features, layer.rank
        made.append(
            _quantized_linear(f"{layer.name}.up", "linear", sizes, layer.has_bias, factors, False, False)
        )
        return made


FLOAT = StorageFormat()
"""Weights and factors stay floating point."""


def storage_formats_of(
    quantize: str | None, group_size: int | None = None, correction: bool = False
) -> tuple[StorageFormat, ...]:
    """Return the forms that a request allows.

    Args:
        quantize: ``"int8"``, ``"int4"``, ``None`` for floating point, or ``"auto"`` for all of them.
        group_size: Elements that share a scale under ``"int4"``.
        correction: Whether factors correct coded weights; ``"auto"`` allows that anyway.

    Raises:
        SchemeError: If the scheme is unknown, or there is nothing to correct or to group.
    """
    if quantize is None:
        if correction:
            raise SchemeError('correction=True corrects what codes lose: give quantize="int4" with it.')
        if group_size is not None:
            raise SchemeError(f'group_size={group_size!r} is for quantize="int4"; leave it out.')
        return (FLOAT,)
    if quantize == "auto":
        int4 = Scheme("int4", group_size)
        return FLOAT, StorageFormat(INT8), StorageFormat(int4), StorageFormat(int4, correction=True)
    return (StorageFormat(Scheme(quantize, group_size), correction),)


def scheme_of(code: QuantizedWeight) -> Scheme:
    """Return the scheme that ``code`` names; raises `SchemeError` if there is none, or it does not divide."""
    scheme = Scheme(code.scheme, code.group_size)
    scheme.check(code.rows, code.columns)
    return scheme


def quantized_bytes(code: QuantizedWeight) -> int:
    """Return the bytes of codes, scales, and what is done to inputs."""
    scheme = scheme_of(code)
    shapes = scheme.shapes(code.rows, code.columns)
    stored = sum(
        math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, scheme.dtypes, strict=True)
    )
    return stored + 2 * code.columns * (code.smooth_scale + code.input_shift)


def stored_bytes(layer: LayerPlan, codes: Iterable[QuantizedWeight], width: int) -> int:
    """Return the bytes of a layer's weight or factors, of which ``codes`` are coded.

    The bias that the dense layer has is left out.

    Args:
        layer: Its entry, with the rank that it will have.
        codes: As `StorageFormat.quantized` gave them.
        width: Bytes of an element in floating point.
    """
    codes = list(codes)
    coded = sum(code.rows * code.columns for code in codes)
    added = width * layer.bias_features if layer.added_bias and layer.rank is not None else 0
    return sum(map(quantized_bytes, codes)) + width * (layer.parameters - coded) + added


def _coded_table(layer: LayerPlan, scheme: Scheme) -> list[QuantizedWeight]:
    """Describe a coded table, or its coded factors."""
    how = scheme.name, scheme.group_size
    if layer.rank is None:
        return [QuantizedWeight(layer.name, EMBEDDING, layer.out_features, layer.in_features, False, *how)]
    return [
        QuantizedWeight(f"{layer.name}.down", EMBEDDING, layer.out_features, layer.rank, False, *how),
        QuantizedWeight(f"{layer.name}.up", "linear", layer.in_features, layer.rank, layer.has_bias, *how),
    ]


def _quantized_linear(
    name: str,
    layer_type: str,
    sizes: tuple[int, int],
    bias: bool,
    scheme: Scheme,
    smooth_scale: bool,
    takes_mean: bool,
) -> QuantizedWeight:
    """Describe a coded weight; only integers that meet integer inputs gain from taking their mean away."""
    input_shift = smooth_scale and takes_mean and scheme.name == "int8"
    return QuantizedWeight(
        name, layer_type, *sizes, bias, scheme.name, scheme.group_size, smooth_scale, input_shift
    )

"""What happens to one layer, and to one weight that is stored as integers: entries of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank.config import check_rank
from lowrank.errors import PlanError
from lowrank.plans.fields import check_fields

EMBEDDING = "embedding"
"""The layer type of embeddings; linear layers have the names of `lowrank.nn.layer_types`."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Args:
        name: Module name, as in ``model.named_modules()``.
        layer_type: Which dense layer it is, ``"linear"`` (weight ``(out, in)``) or ``"conv1d"``; or
            ``"embedding"``, an embedding of ``out_features`` rows of ``in_features``.
        in_features, out_features: Shape of the weight.
        bias: Whether the dense layer has a bias.
        rank: Inner size of the factors; ``None`` leaves the layer as it is.
        relative_error: ``‖W − LR‖ / ‖W‖`` at that rank under the plan's metric; ``None`` until measured.
        held_out_error: The same on tokens that calibration had not used, as a trial factorization fared
            there; ``None`` without statistics.
        shares_down_with: The layer whose ``down`` this one uses; ``None`` if it has its own.
        same_input: Whether that layer reads the same input, so that one product serves both; if not, they
            are of adjacent blocks, and have a basis in common.
        tied_to: The embedding or linear layer whose weight this one uses, its factors or codes if it has
            some; ``None`` if it has a weight of its own. The rank is then that of the other.
        was_copy: Whether it has an equal weight of its own until then; if not, they are tied.
        reason: Why the layer has this rank, or why it stays dense.
        targeted: Whether the layer may change and counts for `keep`; if not, `reason` says why.
        added_bias: Whether the factorized layer gets a bias that the dense one has not.
        loss_increase: Predicted increase of the objective per term (a sample, or a token of a language
            model); ``None`` unless the metric is ``"loss"``.
        correction: Whether the weight stays, as integers, and the factors correct what these lost:
            ``W ≈ Q + LR``. The plan then has a `QuantizedWeight` called ``"….base"``.
        pivoted: Whether the factors are pivoted (`lowrank.linalg.pivots`): ``down`` has rows of the product.
        overruled: Whether the layer may change although reading the model's code leaves a doubt, which the
            user has overruled.
        kept_inputs, kept_outputs: How many input and output features remain where a feed-forward block has
            lost neurons; ``None`` for all. The layer stays dense, and is narrower.
        feeds: Of a layer that has lost output features, the layer that reads them, and has lost them, too.
    """

    name: str
    layer_type: str
    in_features: int
    out_features: int
    bias: bool
    rank: int | None = None
    relative_error: float | None = None
    reason: str = ""
    targeted: bool = True
    added_bias: bool = False
    loss_increase: float | None = None
    held_out_error: float | None = None
    shares_down_with: str | None = None
    correction: bool = False
    tied_to: str | None = None
    same_input: bool = True
    was_copy: bool = False
    overruled: bool = False
    pivoted: bool = False
    kept_inputs: int | None = None
    kept_outputs: int | None = None
    feeds: str | None = None

    def __post_init__(self) -> None:
        check_fields(type(self), {"name": self.name}, "A layer of a plan")
        if self.rank is not None:
            check_rank(self.rank, where=self.name)
        check_fields(type(self), vars(self), self.name)
        for side, features in (("inputs", self.in_features), ("outputs", self.out_features)):
            kept = getattr(self, f"kept_{side}")
            if kept is not None and (not 1 <= kept < features or self.rank is not None):
                raise PlanError(
                    f"{self.name}: kept_{side}={kept} neurons are to remain of {features:,}"
                    f"{'' if self.rank is None else f' at rank {self.rank}'}. Keep at least one and fewer "
                    "than all, in a layer without a rank; or leave the layer as it is."
                )

    @property
    def is_narrower(self) -> bool:
        """Whether the layer has lost input or output features."""
        return self.kept_inputs is not None or self.kept_outputs is not None

    @property
    def kept_shape(self) -> tuple[int, int]:
        """The shape ``(out, in)`` of the weight of a layer without a rank, after applying."""
        return self.kept_outputs or self.out_features, self.kept_inputs or self.in_features

    @property
    def form(self) -> tuple[object, ...]:
        """What tells layers of one shape apart that compute with other modules or sizes."""
        return self.rank, self.tied_to, self.kept_inputs, self.kept_outputs

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding: a lookup of rows, not a product."""
        return self.layer_type == EMBEDDING

    @property
    def has_bias(self) -> bool:
        """Whether the factorized layer has a bias."""
        return self.bias or self.added_bias

    @property
    def bias_features(self) -> int:
        """Elements of a bias: the outputs; of an embedding, the elements of a row."""
        return self.in_features if self.is_embedding else self.out_features

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight, without the bias."""
        return self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        """Parameters of the weight, or of its two factors, after applying; 0 where another has them."""
        if self.tied_to is not None:
            return 0
        return math.prod(self.kept_shape) if self.rank is None else self.parameters_at(self.rank)

    def parameters_at(self, rank: int) -> int:
        """Parameters at ``rank``: ``rank · (in + out)``, or ``rank · out`` with the ``down`` of another.

        Pivoted factors have ``rank · (in + out − rank)``. Those of a correction are in addition to the
        weight's.
        """
        if self.pivoted:
            return rank * (self.out_features + self.in_features - rank)
        factors = rank * (self.out_features + (self.in_features if self.shares_down_with is None else 0))
        return factors + (self.dense_parameters if self.correction else 0)

    @property
    def break_even_rank(self) -> int:
        """The largest rank with fewer parameters than the dense weight; 0 if there is none."""
        if self.pivoted:
            return min(self.in_features, self.out_features) - 1
        return (self.dense_parameters - 1) // (self.in_features + self.out_features)

    @property
    def kept_fraction(self) -> float:
        """Parameters after applying over parameters of the dense weight."""
        return self.parameters / self.dense_parameters if self.dense_parameters else 1.0

    def dense(self, reason: str) -> LayerPlan:
        """Return this layer left as it is, for ``reason``."""
        return replace(self.edited(None, reason), targeted=self.targeted, added_bias=False)

    def following(self, owner: str) -> LayerPlan:
        """Return this layer with the weight of ``owner`` in place of its own."""
        return replace(self, tied_to=owner, reason=f"uses the weight of {owner}", targeted=False)

    def edited(self, rank: int | None, reason: str) -> LayerPlan:
        """Return this layer with another rank, which nothing is known of yet, and a factor of its own."""
        return replace(
            self,
            rank=rank,
            reason=reason,
            targeted=True,
            relative_error=None,
            loss_increase=None,
            held_out_error=None,
            shares_down_with=None,
            correction=False,
            pivoted=self.pivoted and rank is not None,
            same_input=True,
            kept_inputs=None,
            kept_outputs=None,
            feeds=None,
        )


def largest_shared_rank(layers: Sequence[LayerPlan]) -> int:
    """Return the largest joint rank with fewer parameters than the dense weights; 0 if there is none."""
    dense = sum(layer.dense_parameters for layer in layers)
    return (dense - 1) // parameters_per_shared_rank(layers)


def parameters_per_shared_rank(layers: Sequence[LayerPlan]) -> int:
    """Parameters of joint factors per rank."""
    return layers[0].in_features + sum(layer.out_features for layer in layers)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as integers, after whatever was factorized.

    Args:
        name: Module name: of a dense layer, of one factor (``"….query.down"``), of the weight that factors
            correct (``"….query.base"``), or of an embedding.
        layer_type: ``"linear"``, ``"conv1d"`` or ``"embedding"``.
        rows, columns: Shape of the weight, ``(out, in)`` of a linear layer.
        bias: Whether the module has a bias.
        scheme: ``"int8"`` or ``"int4"``.
        group_size: Elements that share a scale; ``None`` for whole rows.
        smooth_scale: Whether the layer scales its inputs before they meet the codes.
        input_shift: Whether it takes their mean from them.
    """

    name: str
    layer_type: str
    rows: int
    columns: int
    bias: bool
    scheme: str
    group_size: int | None = None
    smooth_scale: bool = False
    input_shift: bool = False

    @property
    def is_embedding(self) -> bool:
        """Whether the weight is looked up by rows, not multiplied by."""
        return self.layer_type == EMBEDDING

"""A plan: what to do with each layer of a model, as plain data. Nothing here touches a model.

A `Plan` is frozen; it prints as a table, survives JSON, can be edited (`Plan.with_rank`) and compared
(`Plan.diff`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank.arguments import accepts, every, instance, path, text
from lowrank.config import check_rank
from lowrank.errors import PlanError, RankError, TargetError
from lowrank.files.atomic_file import replaced
from lowrank.files.json_file import check_regular, parse_json
from lowrank.plans.diff import Change
from lowrank.plans.fields import check_fields
from lowrank.plans.layer_plan import LayerPlan, QuantizedWeight
from lowrank.plans.patterns import matches, no_match
from lowrank.plans.plan_json import LISTS, PLAN_FORMAT, plan_fields
from lowrank.plans.plan_table import layers_table
from lowrank.plans.reach import UnplannedWeight, describe_reach, describe_small_reach


@dataclass(frozen=True)
class Plan:
    """What happens to every linear layer of a model, and to its embeddings and quantized weights.

    Args:
        model: Class name of the model that the plan was made for.
        layers: One `LayerPlan` per linear layer, in the model's order.
        budget: The request: ``"keep=0.5"``. Only its name is read again (`bounds_errors`).
        metric: What the errors measure, one of `METRICS`; ``"weight"`` is the relative Frobenius error.
        allocation: ``"global"`` or ``"uniform"``, how `keep` was spread over the layers.
        round_to: Chosen ranks are multiples of this.
        tolerance: Largest relative excess over each layer's optimal error that `apply` may have.
        quantized: The weights that are stored as integers; they are quantized after the layers are
            factorized.
        model_parameters: All parameters of the model, a tied weight counted once; ``None`` if not known.
        unplanned: Those that belong to no layer of the plan, with the reason.
    """

    model: str
    layers: tuple[LayerPlan, ...] = ()
    budget: str = ""
    metric: str = "weight"
    allocation: str = "global"
    round_to: int = 8
    tolerance: float = 1e-3
    quantized: tuple[QuantizedWeight, ...] = ()
    model_parameters: int | None = None
    unplanned: tuple[UnplannedWeight, ...] = ()
    _index: dict[str, LayerPlan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = {name: value for name, value in vars(self).items() if name not in LISTS}
        check_fields(type(self), values, "The plan")
        for name, item in LISTS.items():
            every(instance(item, f"a {item.__name__}", PlanError), (list, tuple), "a list", PlanError)(
                name, getattr(self, name)
            )
            object.__setattr__(self, name, tuple(getattr(self, name)))
        ranks = {layer.name: layer.rank for layer in self.layers}
        layers = (
            layer if layer.tied_to not in ranks else replace(layer, rank=ranks[layer.tied_to])
            for layer in self.layers
        )
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "_index", {layer.name: layer for layer in self.layers})
        if len(self._index) != len(self.layers):
            names = [layer.name for layer in self.layers]
            twice = next(name for name in names if names.count(name) > 1)
            raise PlanError(f"{twice}: the plan lists this layer twice. Keep one of the entries.")
        quantized = [weight.name for weight in self.quantized]
        if len(set(quantized)) != len(quantized):
            twice = next(name for name in quantized if quantized.count(name) > 1)
            raise PlanError(f"{twice}: the plan quantizes this weight twice. Keep one of the entries.")

    def __getitem__(self, name: str) -> LayerPlan:
        try:
            return self._index[name]
        except KeyError:
            raise PlanError(f"{name}: the plan for {self.model} has no such layer.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def factorized(self) -> tuple[LayerPlan, ...]:
        """The layers that have a rank of their own, those included that are factorized already."""
        return tuple(layer for layer in self.layers if layer.rank is not None and layer.tied_to is None)

    @property
    def tied(self) -> tuple[LayerPlan, ...]:
        """The layers that use the factors or codes of an embedding, or of another layer."""
        compressed = {x.name for x in self.factorized} | {weight.name for weight in self.quantized}
        return tuple(layer for layer in self.layers if layer.tied_to in compressed)

    @property
    def equal(self) -> dict[str, tuple[LayerPlan, ...]]:
        """By name of a linear layer, the other linear layers that use its weight."""
        users: dict[str, list[LayerPlan]] = {}
        for layer in self.layers:
            owner = self._index.get(layer.tied_to) if layer.tied_to is not None else None
            if owner is not None and not owner.is_embedding:
                users.setdefault(owner.name, []).append(layer)
        return {name: tuple(layers) for name, layers in users.items()}

    @property
    def owners(self) -> dict[str, str]:
        """By name of a linear layer that uses the weight of another one, the name of that."""
        return {layer.name: owner for owner, users in self.equal.items() for layer in users}

    @property
    def overruled(self) -> frozenset[str]:
        """The names of the layers of which the user has overruled a doubt."""
        return frozenset(layer.name for layer in self.layers if layer.overruled)

    @property
    def targeted(self) -> tuple[LayerPlan, ...]:
        """The layers over which `keep` counts parameters."""
        return tuple(layer for layer in self.layers if layer.targeted)

    @property
    def shared(self) -> dict[str, tuple[LayerPlan, ...]]:
        """By owner of a ``down``, the layers that use it, the owner first; it need not be in the plan."""
        users: dict[str, list[LayerPlan]] = {}
        for layer in self.factorized:
            if layer.shares_down_with is not None:
                users.setdefault(layer.shares_down_with, []).append(layer)
        return {
            name: (*((self._index[name],) if name in self._index else ()), *layers)
            for name, layers in users.items()
        }

    @property
    def bounds_errors(self) -> bool:
        """Whether the request was a bound on every layer's error."""
        return self.budget.startswith(("error=", "energy="))

    @property
    def loss_increase(self) -> float | None:
        """Predicted increase of the objective per term: the sum over the layers; ``None`` if not known."""
        known = [layer.loss_increase for layer in self.layers if layer.loss_increase is not None]
        complete = known and all(layer.loss_increase is not None for layer in self.factorized)
        return sum(known) if complete else None

    @property
    def reachable_parameters(self) -> int:
        """Parameters of the dense weights that the plan may change, and of those that it quantizes."""
        quantized = {weight.name for weight in self.quantized}
        layers = [x for x in self.layers if x.targeted or x.name in quantized or (x.rank and not x.tied_to)]
        embeddings = [weight for weight in self.quantized if weight.is_embedding and not self._has(weight)]
        return sum(x.dense_parameters for x in layers) + sum(
            weight.rows * weight.columns for weight in embeddings
        )

    @property
    def reachable_fraction(self) -> float:
        """The reachable parameters over all parameters of the model; 1 if these are not known."""
        return self.reachable_parameters / self.model_parameters if self.model_parameters else 1.0

    def describe_reach(self) -> str:
        """Say how much of the model can change, what the rest is, and which large tensors are among that."""
        given = self.model_parameters or 0, self.reachable_parameters, self.unplanned
        return describe_reach(self.model, *given)

    def small_reach(self) -> str:
        """Say that little of the model can change, what most of the rest is, and what to do about it."""
        given = self.model_parameters or 0, self.reachable_parameters, self.unplanned
        return describe_small_reach(self.model, *given)

    def _has(self, weight: QuantizedWeight) -> bool:
        """Tell whether ``weight`` is that of a layer or embedding in the plan, or of its factor."""
        return _layer_of(weight, self._index) in self._index

    @property
    def kept_fraction(self) -> float:
        """Parameters that remain over parameters before, of the targeted weights."""
        before = sum(layer.dense_parameters for layer in self.targeted)
        return sum(layer.parameters for layer in self.targeted) / before if before else 1.0

    @accepts(layers=instance(Mapping, "a mapping of layer names to LayerPlans", PlanError))
    def with_layers(self, layers: Mapping[str, LayerPlan]) -> Plan:
        """Return the plan with the named layers replaced."""
        return replace(self, layers=tuple(layers.get(layer.name, layer) for layer in self.layers))

    def without_needless_ties(self) -> Plan:
        """Return the plan in which copies of a layer that stays as it is stay as they are, for its reason."""
        changed = {layer.name for layer in self.tied}
        layers = {
            layer.name: replace(
                layer, tied_to=None, was_copy=False, reason=self[name].reason, targeted=self[name].targeted
            )
            for name, users in self.equal.items()
            for layer in users
            if layer.was_copy and layer.name not in changed
        }
        return self.with_layers(layers)

    def explains(self, found: Plan) -> bool:
        """Tell whether every layer of ``found`` has an entry here with the same rank, tie and width."""
        mine = {layer.name: layer.form for layer in self.layers}
        return all(mine.get(layer.name, ()) == layer.form for layer in found)

    def carried_out(self, found: Plan) -> Plan:
        """Return ``found``, a draft of the compressed model, with this plan's request and reasons.

        A layer keeps its entry here if it has the rank, the tie and the width that the plan gave it; an error
        is ``found``'s, which was measured, or else the plan's.
        """
        _check_plan("found", found)
        layers = {}
        for layer in found:
            planned = self._index.get(layer.name)
            if planned is not None and planned.form == layer.form:
                error = planned.relative_error if layer.is_narrower else layer.relative_error
                layers[layer.name] = replace(planned, relative_error=error)
        layers_now = found.with_layers(layers).layers
        done = replace(self, model=found.model, layers=layers_now, quantized=found.quantized)
        # what lies outside of the layers is known of this model only, not of one within it
        return done if found.model == self.model else replace(done, model_parameters=None, unplanned=())

    @accepts(pattern=text(TargetError))
    def with_rank(self, pattern: str, rank: int | None) -> Plan:
        """Return the plan with every matching layer set to ``rank``; `apply` checks that they can be.

        An edited layer shares no factor any more; layers that shared one with it go on without it. Codes that
        it had, and a correction of them, are gone as well: `lowrank.quantize` codes it again.

        Args:
            pattern: Unix-style pattern on layer names.
            rank: The new rank, ``1 .. min(out, in)``; ``None`` leaves the layers dense.

        Raises:
            TargetError: If the pattern matches no layer of the plan, or only one that uses an embedding's
                weight.
            RankError: If the rank is not a positive integer.

        Example:
            >>> layer = LayerPlan("encoder.query", "linear", 64, 64, bias=True)
            >>> Plan("Model", (layer,)).with_rank("*.query", 16)["encoder.query"].rank
            16
        """
        if rank is not None:
            check_rank(rank, where=pattern)
        chosen = [layer for layer in self.layers if matches(layer.name, pattern)]
        if not chosen:
            raise no_match(pattern, list(self._index), "layers of the plan")
        used = next((layer for layer in chosen if layer.tied_to is not None), None)
        if used is not None and len(chosen) == 1:
            raise TargetError(
                f"{used.name}: has the rank of {used.tied_to}, whose weight it uses. Name that."
            )
        chosen = [layer for layer in chosen if layer.tied_to is None and layer.dense_parameters]
        if not chosen and used is None:
            raise TargetError(f"{pattern}: the layers that it matches have no elements, and stay.")
        reason = "left dense by hand" if rank is None else "set by hand"
        edited = {layer.name: layer.edited(rank, reason) for layer in chosen}
        return self._parted_from(edited.keys()).with_layers(edited)._in_floating_point(edited)

    def _in_floating_point(self, names: Collection[str]) -> Plan:
        """Return the plan with the weights and factors of the named layers in floating point."""
        quantized = (weight for weight in self.quantized if _layer_of(weight, self._index) not in names)
        return replace(self, quantized=tuple(quantized))

    def _parted_from(self, names: Collection[str]) -> Plan:
        """Return the plan with the layers that share a ``down`` with one of ``names`` going on without that.

        Their joint factor is another one then, whose errors are not known.
        """
        layers: dict[str, LayerPlan] = {}
        for users in self.shared.values():
            left = [layer for layer in users if layer.name not in names]
            if left and len(left) < len(users):
                for layer in left:
                    owner = None if layer is left[0] else left[0].name
                    alone = layer.edited(layer.rank, layer.reason)
                    same = layer.same_input or owner is None
                    layers[layer.name] = replace(alone, shares_down_with=owner, same_input=same)
        return self.with_layers(layers)._in_floating_point(layers)

    def diff(self, other: Plan) -> list[Change]:
        """List the layers whose rank or storage format differs, or that only one of the plans has."""
        _check_plan("other", other)
        names = list(dict.fromkeys([layer.name for layer in [*self.layers, *other.layers]]))
        mine, its = self.schemes(), other.schemes()
        changes = [
            Change(name, self._index.get(name), other._index.get(name), mine.get(name), its.get(name))
            for name in names
        ]
        return [change for change in changes if change.sides[0] != change.sides[1]]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as dicts, lists, strings and numbers, with its format number first."""
        data = asdict(self)
        del data["_index"]
        return {"format": PLAN_FORMAT, **data, **{name: list(data[name]) for name in LISTS}}

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Make a plan from what `to_dict` gave, perhaps edited by hand or written by a stranger.

        Raises:
            PlanError: If it is no plan, is from another version, or a field has a wrong type.
            RankError: If a rank is not positive.
        """
        return cls(**plan_fields(data, cls))

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    @accepts(text=text(PlanError))
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; raises `PlanError` as `from_dict` does."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"The plan is not JSON: {error}.") from error
        return cls.from_dict(data)

    @accepts(path=path(PlanError))
    def save(self, path: str | Path) -> None:
        """Write the plan as JSON to ``path``, in one step.

        Raises:
            CheckpointError: If the file cannot be written; an older one is then as it was.
        """
        text = self.to_json() + "\n"
        with replaced(Path(path)) as new:
            new.write_text(text, encoding="utf-8")

    @classmethod
    @accepts(path=path(PlanError))
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from ``path``.

        Raises:
            PlanError: If the file cannot be read, or is not a plan.
            RankError: If a rank in it is not positive.
        """
        try:
            check_regular(path)
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: the plan cannot be read: {error}.") from error
        try:
            return cls.from_json(text)
        except (PlanError, RankError) as error:
            raise type(error)(f"{path}: {error}") from error

    def __str__(self) -> str:
        before = sum(layer.dense_parameters for layer in self.targeted)
        after = sum(layer.parameters for layer in self.targeted)
        embeddings = any(layer.is_embedding for layer in self.layers)
        layers = "linear layers and embeddings" if embeddings else "linear layers"
        narrow = sum(layer.is_narrower for layer in self.layers)
        narrower = f", {narrow} with fewer neurons" if narrow else ""
        footer = (
            f"{self.model}, {self.budget or 'no budget'}: {len(self.factorized)} of {len(self.layers)} "
            f"{layers} factorized{narrower}; {after:,} of {before:,} targeted parameters remain"
            f" ({self.kept_fraction:.1%})."
        )
        if self.metric != "weight":
            footer += f" Errors are of the metric {self.metric!r}."
        if self.loss_increase is not None:
            footer += f" Predicted increase of the loss: {self.loss_increase:.4g}."
        for scheme in sorted({weight.scheme for weight in self.quantized}):
            footer += f" {sum(weight.scheme == scheme for weight in self.quantized)} weights as {scheme}."
        reach = [] if self.model_parameters is None else [self.describe_reach()]
        return "\n\n".join([*reach, layers_table(self.layers, self.schemes()), footer])

    def schemes(self) -> dict[str, str]:
        """Return by layer how it is stored, such as ``"int4 + int8"`` for a correction."""
        found: dict[str, list[str]] = {}
        for weight in self.quantized:
            found.setdefault(_layer_of(weight, self._index), []).append(weight.scheme)
        return {name: " + ".join(dict.fromkeys(schemes)) for name, schemes in found.items()}


def _check_plan(name: str, value: object) -> None:
    instance(Plan, "a Plan, from plan(model, ...)", PlanError)(name, value)


def _layer_of(weight: QuantizedWeight, layers: Container[str]) -> str:
    """Return the name of the layer or embedding that ``weight`` is of, or of whose factor."""
    parent = weight.name.rpartition(".")[0]
    return weight.name if weight.name in layers or parent not in layers else parent

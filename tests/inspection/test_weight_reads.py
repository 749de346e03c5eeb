"""Weights that methods read by value: found however the method gets at the layer, and only then."""

import sys
from functools import cached_property, wraps

import pytest
import torch
from readers import Model
from torch import nn
from torch.nn import functional

from lowrank import compress
from lowrank.errors import TargetError
from lowrank.inspection.eligibility import ineligible_layers
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft


def logged(function):
    @wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class FirstArgument(Model):
    def forward(this, x):  # noqa: N805
        return x @ this.proj.weight


class Grandchild(Model):
    def forward(self, x):
        return x @ self.block.lin.weight


class ConstantIndex(Model):
    def forward(self, x):
        return x @ self.layers[0].weight


class ConstantKey(Model):
    def forward(self, x):
        return x @ self.named["a"].weight


class GrandchildByIndex(Model):
    def forward(self, x):
        return x @ self.blocks[1].lin.weight


class ComputedIndex(Model):
    def forward(self, x, i):
        return x @ self.layers[i + 1].weight


class NegativeIndex(Model):
    def forward(self, x):
        return x @ self.layers[-1].weight


class Loop(Model):
    def forward(self, x):
        for layer in self.layers:
            x = functional.linear(x, layer.weight, layer.bias)
        return x


class NumberedLoop(Model):
    def forward(self, x):
        for i, layer in enumerate(reversed(self.layers[1:])):
            x = i * x @ layer.weight
        return x


class LoopOverBlocks(Model):
    def forward(self, x):
        for block in self.blocks:
            x = x @ block.lin.weight
        return x


class LoopOverItems(Model):
    def forward(self, x):
        for _, layer in self.named.items():
            x = x @ layer.weight
        return x


class LoopOverTwo(Model):
    def forward(self, x):
        for layer in (self.proj, self.block.lin):
            x = x @ layer.weight
        return x


class Comprehension(Model):
    def forward(self, x):
        return x @ sum([layer.weight for layer in self.layers])


class Generator(Model):
    def forward(self, x):
        return x @ sum(layer.weight for layer in self.named.values())


class LocalName(Model):
    def forward(self, x):
        lin = self.proj
        return functional.linear(x, lin.weight)


class NameOfABlock(Model):
    def forward(self, x):
        first, _ = self.block, x
        lin: nn.Linear = first.lin
        return functional.linear(x, lin.weight)


class NameOfAChoice(Model):
    def forward(self, x):
        lin = self.proj if x.ndim == 2 else self.block.lin
        return x @ lin.weight


class NameBoundBelow(Model):
    def forward(self, x):
        lin = None
        for _ in range(2):
            if lin is not None:
                x = x @ lin.weight
            lin = self.proj
        return x


class Walrus(Model):
    def forward(self, x):
        return x @ lin.weight if (lin := self.proj) is not None else x


class GetAttr(Model):
    def forward(self, x):
        return x @ getattr(self.proj, "weight")  # noqa: B009


class GetAttrOfTheLayer(Model):
    def forward(self, x, i):
        return x @ getattr(self.block, f"lin{i}").weight


class Property(Model):
    @property
    def basis(self):
        return self.proj.weight.T


class CachedProperty(Model):
    @cached_property
    def basis(self):
        return self.proj.weight.T


class Decorated(Model):
    @logged
    def forward(self, x):
        return x @ self.proj.weight


class Closure(Model):
    def forward(self, x):
        def multiply(y):
            return y @ self.proj.weight

        return multiply(x)


class FlushLeftText(Model):
    def forward(self, x):
        """A text
        that goes back to the margin."""
        return x @ self.proj.weight


class Lambda(Model):
    forward = lambda self, x: x @ self.proj.weight  # noqa: E731


LAYERS = {"layers.0", "layers.1"}
READ = {
    FirstArgument: {"proj"},
    Grandchild: {"block.lin"},
    ConstantIndex: {"layers.0"},
    ConstantKey: {"named.a"},
    GrandchildByIndex: {"blocks.1.lin"},
    ComputedIndex: LAYERS,
    NegativeIndex: LAYERS,
    Loop: LAYERS,
    NumberedLoop: LAYERS,
    LoopOverBlocks: {"blocks.0.lin", "blocks.1.lin"},
    LoopOverItems: {"named.a", "named.b"},
    LoopOverTwo: {"proj", "block.lin"},
    Comprehension: LAYERS,
    Generator: {"named.a", "named.b"},
    LocalName: {"proj"},
    NameOfABlock: {"block.lin"},
    NameOfAChoice: {"proj", "block.lin"},
    NameBoundBelow: {"proj"},
    Walrus: {"proj"},
    GetAttr: {"proj"},
    GetAttrOfTheLayer: {"block.lin", "block.other"},
    Property: {"proj"},
    CachedProperty: {"proj"},
    Decorated: {"proj"},
    Closure: {"proj"},
    FlushLeftText: {"proj"},
    Lambda: {"proj"},
}


@pytest.mark.parametrize(("cls", "layers"), READ.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_layer_that_a_method_reads_by_value_stays_dense_however_it_is_reached(cls, layers):
    reason = f"has its weight read by value in {cls.__name__}"
    assert ineligible_layers(Inspection(cls())) == dict.fromkeys(layers, reason)


class Assigned(Model):
    def set(self, weight):
        self.proj.weight = weight
        self.spare = self.proj
        return self.weight


class Looked(Model):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype).to(self.block.lin.weight.device))
        return x


class Renamed(Model):
    def forward(self, x):
        module = self
        return module.proj(x) @ self.weight


class Initialised(Model):
    def _init_weights(self):
        nn.init.zeros_(self.proj.weight)


class OfAnother(Model):
    def forward(self, x, proj, other):
        x = self.proj(x)
        return x + proj.weight + other.proj.weight + x.weight


class OfTheResult(Model):
    def forward(self, x):
        out = self.block(self.proj(x))
        return out.weight + self.block(x).weight


class AskedForItsType(Model):
    def forward(self, x):
        weight_is_there = self.called.weight is not None and None is not self.proj
        if isinstance(self.proj.weight, torch.Tensor) and x.dtype != self.proj.weight.dtype:
            x = x.to(self.proj.weight.dtype)
        return self.called(self.proj(x)) if weight_is_there else x


@pytest.mark.parametrize(
    "cls",
    [Assigned, Looked, Renamed, Initialised, OfAnother, OfTheResult, AskedForItsType],
    ids=lambda cls: cls.__name__,
)
def test_a_layer_that_is_called_set_initialised_or_asked_for_its_type_may_shrink(cls):
    assert ineligible_layers(Inspection(cls())) == {}


class Compared(Model):
    def forward(self, x):
        same = self.proj.weight is self.called.weight  # no longer, once both are factors
        return x + self.block.lin.weight.shape[0] if same else x


class AskedForAParameter(Model):
    def forward(self, x):
        return x if isinstance(self.proj.weight, nn.Parameter) else self.proj(x)


def test_the_identity_and_the_shape_of_a_weight_count_as_its_value():
    assert set(ineligible_layers(Inspection(Compared()))) == {"proj", "called", "block.lin"}


def test_whether_a_weight_is_a_parameter_counts_since_that_of_a_factorized_layer_is_none():
    assert set(ineligible_layers(Inspection(AskedForAParameter()))) == {"proj"}


def test_naming_a_grandchild_that_the_model_reads_by_value_is_an_error_and_the_plan_has_the_reason():
    model = nn.Sequential(Grandchild())
    with pytest.raises(TargetError, match=r"^0\.block\.lin: .*has its weight read by value in Grandchild"):
        draft(Inspection(model), ["0.block.lin"])
    assert draft(Inspection(model))["0.block.lin"].reason == "has its weight read by value in Grandchild"


def test_the_reason_names_the_nearest_reader():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = LocalName()

        def forward(self, x):
            return x @ self.inner.proj.weight

    assert ineligible_layers(Inspection(Outer())) == {
        "inner.proj": "has its weight read by value in LocalName"
    }


def test_a_model_that_reads_through_a_container_still_runs_when_the_rest_is_compressed():
    class Runs(Loop):
        def forward(self, x):
            return super().forward(self.called(x))

    x = torch.randn(2, 32)
    assert compress(Runs().eval(), rank=4)(x).shape == x.shape


def test_without_its_source_whatever_a_reading_method_names_is_suspected_and_what_is_directly_below():
    lines = (
        *("class Hidden(Model):", "    def forward(self, x):", "        x = self.called(x)"),
        *("        for layer in self.layers:", "            x = x @ layer.weight"),
        *(
            "        return x @ self.block.lin.weight",
            "    def other(self, x):",
            "        return self.proj(x)",
        ),
    )
    names = {"Model": Model, "__name__": __name__}
    exec("\n".join(lines), names)
    assert set(ineligible_layers(Inspection(names["Hidden"]()))) == {
        "called",
        "layers.0",
        "layers.1",
        "block.lin",
        "block.other",
    }


def test_without_its_source_a_method_that_reads_no_weight_suspects_nothing():
    names = {"Model": Model, "__name__": __name__}
    exec("class Hidden(Model):\n    def forward(self, x):\n        return self.proj(x)", names)
    assert ineligible_layers(Inspection(names["Hidden"]())) == {}


def test_a_source_edited_since_its_import_is_not_believed(tmp_path, monkeypatch):
    before = "from torch import nn\nclass Edited(nn.Module):\n    def forward(self, x):\n"
    before += "        return x @ self.proj.weight\n"
    (tmp_path / "edited_by_test.py").write_text(before)
    monkeypatch.syspath_prepend(tmp_path)
    import edited_by_test

    (tmp_path / "edited_by_test.py").write_text(before.replace("x @ self.proj.weight", "x"))
    model = edited_by_test.Edited()
    model.proj = nn.Linear(32, 32)
    del sys.modules["edited_by_test"]
    assert set(ineligible_layers(Inspection(model))) == {"proj"}


class Initialised(nn.Module):
    """Has methods whose names only contain what begins the names of those that initialise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def _init_weights(self):
        self.first.weight.data.zero_()

    def reinitialized_logits(self, x):
        return x @ self.second.weight

    def definite_logits(self, x):
        return x @ self.third.weight


def test_only_methods_whose_names_begin_so_are_taken_to_initialise():
    assert set(ineligible_layers(Inspection(Initialised()))) == {"second", "third"}

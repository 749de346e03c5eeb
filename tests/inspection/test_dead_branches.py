"""A read in a branch that constants close does not count."""

import pytest
from readers import Model
from torch import nn

from lowrank.inspection.eligibility import ineligible_layers
from lowrank.inspection.inspection import Inspection


class Config:
    def __init__(self, slices: object) -> None:
        self.slices = slices


class Branches(Model):
    """Its classes read ``proj`` by value in a branch that constants may close."""

    def __init__(self, slices: object = 1, exact: object = False) -> None:
        super().__init__()
        self.slices, self.exact = slices, exact
        self.config = Config(slices)


class OwnNumbers(Branches):
    def forward(self, x):
        if self.slices > 1 and self.exact:
            return x @ self.proj.weight
        return self.proj(x)


class OfTheConfig(Branches):
    def forward(self, x):
        return x @ self.proj.weight if self.config.slices != 1 else self.proj(x)


class Otherwise(Branches):
    def forward(self, x):
        if x.ndim == 2 or not self.slices > 1:
            x = self.proj(x)
        elif self.exact is True:
            for _ in range(self.slices):
                x = x @ self.proj.weight
        return x


@pytest.mark.parametrize("cls", [OwnNumbers, OfTheConfig, Otherwise], ids=lambda cls: cls.__name__)
def test_a_read_in_a_branch_that_constants_close_does_not_count_and_in_an_open_one_it_does(cls):
    assert set(ineligible_layers(Inspection(cls(slices=1, exact=True)))) == set()
    assert set(ineligible_layers(Inspection(cls(slices=2, exact=True)))) == {"proj"}


class OfTheMode(Branches):
    def forward(self, x):
        return x if self.training else x @ self.proj.weight


class OfTheInput(Branches):
    def forward(self, x):
        return x @ self.proj.weight if x.ndim > 2 and self.slices == 1 else x


class SetByAMethod(Branches):
    def be_exact(self):
        self.exact = True

    def forward(self, x):
        return x @ self.proj.weight if self.exact else x


class AProperty(Branches):
    @property
    def large(self):
        return False

    def forward(self, x):
        return x @ self.proj.weight if self.large else x


class AnotherSelf(Branches):
    def forward(self, x, other=None):
        layer = self.proj
        self = other
        return x @ layer.weight if self.exact else x


class NoNumber(Branches):
    def forward(self, x):
        return x @ self.proj.weight if self.block else x


class Chained(Branches):
    def forward(self, x):
        return x @ self.proj.weight if 1 < self.slices < 4 else x


class NotComparable(Branches):
    def forward(self, x):
        return x @ self.proj.weight if self.slices > "1" else x


@pytest.mark.parametrize(
    "cls",
    [OfTheMode, OfTheInput, SetByAMethod, AProperty, AnotherSelf, NoNumber, Chained, NotComparable],
    ids=lambda cls: cls.__name__,
)
def test_a_condition_that_is_not_certain_leaves_its_branch_open(cls):
    assert set(ineligible_layers(Inspection(cls().train()))) == {"proj"}
    assert set(ineligible_layers(Inspection(cls().eval()))) == {"proj"}


def test_a_number_that_another_module_of_the_model_sets_is_no_constant():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = OwnNumbers()

        def slice(self, count):
            self.part.slices = count

    assert set(ineligible_layers(Inspection(nn.Sequential(OwnNumbers())))) == set()
    assert set(ineligible_layers(Inspection(Owner()))) == set()  # ``exact`` alone closes it
    owner = Owner()
    owner.part.exact = True
    assert set(ineligible_layers(Inspection(owner))) == {"part.proj"}

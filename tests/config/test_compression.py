"""The options of compression: what one front door accepts, all accept, or the definition says why not."""

import inspect
import typing

import pytest
from click.testing import CliRunner
from front_doors import OPTIONS, mlp
from typer.main import get_command

import lowrank
from lowrank.cli.commands import app
from lowrank.config import CompressionConfig, PlanOptions, RecoveryConfig
from lowrank.config.options import options_of
from lowrank.errors import BudgetError, LowRankError, RankError, SchemeError, TargetError

DOORS = {
    "compress": lambda: set(inspect.signature(lowrank.compress).parameters),
    "plan": lambda: set(inspect.signature(lowrank.plan).parameters),
    "LowRankConfig": lambda: set(inspect.signature(lowrank.LowRankConfig.__init__).parameters),
    "lowrank compress": lambda: {one.name for one in get_command(app).commands["compress"].params},
    "lowrank plan": lambda: {one.name for one in get_command(app).commands["plan"].params},
}


@pytest.mark.parametrize("door", DOORS)
def test_every_front_door_has_every_option_or_the_definition_says_why_not(door):
    pytest.importorskip("transformers")
    lacks = {name for name, one in OPTIONS.items() if door.removeprefix("lowrank ") in one.missing}
    assert OPTIONS.keys() - DOORS[door]() == lacks
    assert all(one.missing[door] for one in OPTIONS.values() if door in one.missing)


def test_a_plan_takes_what_decides_something():
    carried_out = {name for name, one in OPTIONS.items() if "plan" in one.missing}
    assert typing.get_type_hints(PlanOptions).keys() == OPTIONS.keys() - carried_out


@pytest.mark.parametrize(
    "function", [lowrank.compress, lowrank.plan, lowrank.recover], ids=lambda f: f.__name__
)
def test_help_shows_every_option(function):
    config = RecoveryConfig if function is lowrank.recover else CompressionConfig
    told = " ".join((function.__doc__ or "").split())
    for one in options_of(config):
        if function.__name__ not in one.missing:
            assert f"{one.name}: {' '.join(one.help.split())}" in told


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_the_help_of_the_command_line_is_that_of_the_definition(command):
    told = {one.name: one.help for one in get_command(app).commands[command].params if one.name in OPTIONS}
    assert told and all(told[name].startswith(OPTIONS[name].help) for name in told)
    assert CliRunner().invoke(get_command(app), [command, "--help"]).exit_code == 0


def test_an_option_that_a_front_door_lacks_is_refused_with_the_reason():
    with pytest.raises(TypeError, match=r"^plan\(\): does not take seed=: .*give it to apply"):
        lowrank.plan(mlp(), keep=0.5, seed=1)
    with pytest.raises(TypeError, match=r"keyword argument 'kep'\. Did you mean keep=\?$"):
        lowrank.plan(mlp(), kep=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "taste"}, BudgetError, "metric='taste': give one of 'auto'"),
        ({"round_to": 0}, BudgetError, "round_to=0: give a whole number from 1"),
        ({"targets": []}, TargetError, "names no layer"),
        ({"ignore": "*.query"}, TargetError, "give a list of patterns"),
        ({"quantize": "int3"}, SchemeError, "known schemes are"),
        ({"group_size": 32}, SchemeError, 'is for quantize="int4"'),
        ({"correction": True}, SchemeError, "corrects what quantization loses"),
        ({"share_size": 2}, BudgetError, 'goes with share="layers"'),
        ({"tolerance": 0.0}, LowRankError, "tolerance=0.0: give a finite number above 0"),
        ({"add_bias": 1}, LowRankError, "add_bias=1: give True or False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_out_of_its_range_is_refused_when_the_config_is_made(options, error, message):
    with pytest.raises(error, match=message):
        CompressionConfig(**options)


def test_a_config_has_one_budget():
    assert str(CompressionConfig(max_bytes=10).budget) == "max_bytes=10"
    with pytest.raises(BudgetError, match=r"Give exactly one budget of .*; got none"):
        CompressionConfig().budget  # noqa: B018
    with pytest.raises(BudgetError, match=r"got rank=8 and keep=0\.5"):
        CompressionConfig(rank=8, keep=0.5).budget  # noqa: B018
    with pytest.raises(RankError, match=r"0 is not positive"):
        CompressionConfig(rank=0).budget  # noqa: B018

"""An option is defined once: its default, its help and its row in the guide's table."""

import typing

import pytest
from front_doors import OPTIONS

from lowrank.config import CompressionConfig, CompressionOptions, RecoveryConfig, RecoveryOptions
from lowrank.config.options import given_options, markdown_table, types_of


@pytest.mark.parametrize(
    ("config", "options"), [(CompressionConfig, CompressionOptions), (RecoveryConfig, RecoveryOptions)]
)
def test_the_typed_dictionary_for_keywords_keeps_step_with_the_definition(config, options):
    assert typing.get_type_hints(options) == types_of(config)


def test_only_what_is_not_at_its_default_counts_as_given():
    assert given_options(CompressionConfig(keep=0.5, round_to=8)) == {"keep": 0.5}


def test_the_table_has_a_row_for_every_option():
    rows = markdown_table(CompressionConfig).split("\n")[2:]
    assert [row.split("`")[1] for row in rows] == list(OPTIONS)

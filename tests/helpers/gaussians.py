"""Builders that several test files share."""

from lowrank.linalg import Scheme

SCHEMES = [Scheme("int8"), Scheme("int4"), Scheme("int4", 8)]

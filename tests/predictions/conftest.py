"""Beliefs made by hand."""

from typing import Any, NamedTuple

import pytest


class Belief(NamedTuple):
    """Anything with `.mean` and `.information`, as predictions ask."""

    mean: Any
    information: Any
    meat: Any = None
    dispersion: Any = None
    degrees_of_freedom: Any = None
    count: Any = None


@pytest.fixture(scope="session")
def belief() -> type[Belief]:
    return Belief

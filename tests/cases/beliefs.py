"""A belief made by hand, for functions that take any state."""

from typing import Any, NamedTuple


class Belief(NamedTuple):
    """Anything with `.mean` and `.information`, and what some functions ask more."""

    mean: Any
    information: Any
    meat: Any = None
    dispersion: Any = None
    degrees_of_freedom: Any = None
    count: Any = None

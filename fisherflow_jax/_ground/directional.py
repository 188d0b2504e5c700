"""Derivatives along directions: no array of second or third derivatives is formed."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def derivative(function: Callable, at: PyTree, *directions: PyTree) -> Any:
    r"""`function'...'[u, v, ...]` at a point: one derivative a direction, by tangents.

    Nested as deep as there are directions. Of a number by three of them: some eight
    times the function's own cost, whatever the size of `at`.
    """
    for direction in directions:
        function = _along(function, direction)
    return function(at)


def _along(function: Callable, direction: PyTree) -> Callable:
    return lambda at: jax.jvp(function, (at,), (direction,))[1]

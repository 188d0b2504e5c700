"""A factorisation that rounding does not stop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.information import _operations as ops

PyTree = Any


class Regularised(NamedTuple):
    """An information, factorised once.

    Attributes:
      divide: the function `v -> I^-1 v`.
      logdet: `()`, its log-determinant.
      helped: `()` int32, 1: something was added to make it positive definite.
    """

    divide: Callable[[PyTree], PyTree]
    logdet: jax.Array
    helped: jax.Array


@functools.singledispatch
def regularised(information: Any, like: PyTree | None = None) -> Regularised:
    r"""`solver` and `logdet` by one factorisation, helped where rounding stops it.

    A sum of curvatures is positive definite, but its rounded entries need not be: after
    equilibration to a unit diagonal, full and block add the least of
    :math:`\epsilon, 2 \epsilon, 4 \epsilon, ...` to the diagonal by which the Cholesky
    factor exists, up to the root of :math:`\epsilon`, the spacing of numbers at one.
    What needs more is no rounding, and gives NaN, as `solver` does. The other
    structures keep numbers that rounding leaves positive.
    """
    return Regularised(
        ops.solver(information), ops.logdet(information, like), jnp.zeros((), jnp.int32)
    )

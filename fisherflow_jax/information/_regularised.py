"""A factorisation that rounding does not stop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.information import _operations as ops

PyTree = Any


class Regularised(NamedTuple):
    """An information, factorised once. Made by `ff.information.regularised`.

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

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(
      ...     jnp.array([[1.0, 1.0], [1.0, 1.0]])
      ... )  # singular
      >>> found = ff.information.regularised(information)
      >>> bool(jnp.isfinite(found.logdet))
      True
    """
    return Regularised(
        ops.solver(information), ops.logdet(information, like), jnp.zeros((), jnp.int32)
    )


@functools.singledispatch
def resolved(information: Any, like: PyTree | None = None) -> tuple[Any, PyTree]:
    r"""The information, filled along what its rounding hides, and which directions.

    A direction is hidden where the equilibrated matrix (unit diagonal) has an
    eigenvalue of at most :math:`d \epsilon`, d the order of the matrix: of redundant
    columns under a vague prior. There the eigenvalue grows by one, which any Cholesky
    factor bears; along all others solves and traces are what they were.

    Args:
      information: of any structure.
      like: a tree with the parameters' shapes, for structures that store none.

    Returns:
      `(information, hidden)`: hidden is a tree like the parameters, how much of each
      is along hidden directions, in [0, 1]; it sums to their number. Cost of full and
      block: a Cholesky factor, and eigenvectors where a pivot of it is small. The other
      structures hide nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> twice = ff.structures.Full(jnp.array([[9.0, 9.0], [9.0, 9.0]]))
      >>> filled, hidden = ff.information.resolved(twice)
      >>> print(hidden.round(3))  # one direction, w[0] - w[1]
      [0.5 0.5]
      >>> print(ff.information.solve(filled, jnp.ones(2)).round(3))  # 1 / (9 + 9)
      [0.056 0.056]
    """
    shapes = ops.shapes(information, like)
    return information, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

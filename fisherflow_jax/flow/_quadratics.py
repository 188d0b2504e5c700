"""The minimum of a sum of quadratics: what several beliefs say together."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees

PyTree = Any

# Of conjugate gradients: the residual's share of the right-hand side.
TOLERANCE = 1e-6
# A residual above is not that of rounding, but of too few iterations.
UNFINISHED = 1e-4


class Minimum(NamedTuple):
    """Where a sum of quadratics is least.

    Attributes:
      step: from the common origin.
      information: the sum, in the structure.
      logdet: `()`, its log-determinant.
      helped: `()` int32, as `Regularised` has it.
      value: `()`, twice the sum at its minimum.
      residual: `()`, relative, of the equation; 0 where it is factorised.
    """

    step: PyTree
    information: Any
    logdet: jax.Array
    helped: jax.Array
    value: jax.Array
    residual: jax.Array


@functools.partial(jax.jit, static_argnames=("held", "most"))
def minimum(
    common: Any, parts: Sequence, moves: Sequence, held: bool = True, most: int = 100
) -> Minimum:
    r"""The minimum of what parts have beyond a common belief, and of that belief.

    .. math:: \tfrac12 |x|^2_{I_s} + \sum_k
       \tfrac12 \big( |x - d_k|^2_{I_k} - |x|^2_{I_s} \big)

    It is found as a step from the mean of the moves d_k, so that moves that agree lose
    no digits. A structure whose sums are not the operators' sums (Kronecker) gives the
    preconditioner of conjugate gradients on these, the belief's and what the parts add.

    Args:
      common: I_s, an information.
      parts: I_k, with the common belief in each.
      moves: d_k, from the mean of the common belief.
      held: False: the moves are those of what the parts add alone, with
        :math:`|x - d_k|^2` by :math:`I_k - I_s`.
      most: conjugate gradients, at most.
    """
    information = ops.fuse(common, parts)
    factors = ops.regularised(information, moves[0])
    separate = not ops.facts(common).additive
    if separate:
        parts = [ops.add(part, ops.scale(common, -1.0)) for part in parts]
    centre = optax.tree.scale(1 / len(moves), _sum(moves))
    often = len(parts) - 1 if held else -1
    apart = [optax.tree.sub(move, centre) for move in moves]
    pull = _sum(list(map(ops.matvec, parts, apart)))
    shift = optax.tree.add_scale(pull, often, ops.matvec(common, centre))
    step, residual = factors.divide(shift), jnp.zeros_like(factors.logdet)
    if separate:

        def times(vector: PyTree) -> PyTree:
            return _sum([ops.matvec(each, vector) for each in (common, *parts)])

        step, _ = cg(times, shift, step, tol=TOLERANCE, maxiter=most, M=factors.divide)
        left, whole = optax.tree.sub(shift, times(step)), trees.dot(shift, shift)
        residual = jnp.sqrt(trees.dot(left, left) / jnp.where(whole > 0, whole, 1.0))
    step = optax.tree.add(centre, step)
    left = [optax.tree.sub(step, move) for move in moves]
    value = -often * ops.quadratic_form(common, step)
    value = sum(map(ops.quadratic_form, parts, left), start=value)
    if separate:
        value = sum([ops.quadratic_form(common, x) for x in left], start=value)
    return Minimum(step, information, factors.logdet, factors.helped, value, residual)


def _sum(vectors: Sequence[PyTree]) -> PyTree:
    return functools.reduce(optax.tree.add, vectors)


@jax.jit
def in_common(means: Sequence[PyTree]) -> jax.Array:
    r"""How much of the matrices of several models is common to them, `()`.

    .. math:: \sum_{i \ne j} m_i^\top m_j \Big/ (K - 1) \sum_k |m_k|^2

    1 of equal models, and about 0 of independent ones. Only models with two or more
    matrices have hidden units, in whose order they may differ: of others 1.
    """
    matrices = [[x for x in jax.tree.leaves(mean) if x.ndim > 1] for mean in means]
    if len(means) < 2 or len(matrices[0]) < 2:
        return jnp.ones((), trees.float_dtype(means[0]))
    squares = sum(trees.dot(matrix, matrix) for matrix in matrices)
    total = _sum(matrices)
    shared = (trees.dot(total, total) - squares) / (len(means) - 1)
    return shared / squares

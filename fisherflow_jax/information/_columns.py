"""What is known within columns; and what is best with some entries at zero."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from fisherflow_jax._ground import trees
from fisherflow_jax.information import _operations as ops

PyTree = Any

# Conjugate gradients at most: each costs a product and a solve.
_MOST = 200


class ColumnBlocks(NamedTuple):
    """Blocks `weights[k, o] matrix[k] + shifts[k]` of K O columns of length I.

    Made by `ff.information.spectral`.
    """

    matrix: jax.Array  # (K, I, I), or a diagonal (K, I)
    weights: jax.Array  # (K, O)
    shifts: jax.Array  # (K,)


class ByColumns(NamedTuple):
    """What an information says within columns, apart from what couples them.

    Made by `ff.information.by_columns`.

    Attributes:
      groups: the blocks, of columns that share a matrix.
      split: a tree like the parameters -> an array `(K, I, O)` for each group.
      join: the inverse of `split`.
    """

    groups: list[ColumnBlocks]
    split: Callable[[PyTree], list[jax.Array]]
    join: Callable[[list[jax.Array]], PyTree]


@functools.singledispatch
def by_columns(information: Any, like: PyTree | None = None) -> ByColumns:
    """The information within columns of parameters, as `ByColumns`.

    Full: one column of all parameters. Block: one a block. Scalar and diagonal: each
    entry by itself. Kronecker: a column is what leads to one output of a layer, with
    the bias as its last row; the blocks are those of the matrix, and what couples the
    outputs is left out. A structure that does not register it has the one column of its
    dense matrix.

    Args:
      information: of any structure.
      like: a tree with the parameters' shapes, for structures that store none.

    Raises:
      ValueError: where a dense matrix of more than 4,096 parameters would be needed,
        with its bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> blocks = ff.information.by_columns(ff.structures.Full(jnp.eye(2)))
      >>> type(blocks).__name__
      'ByColumns'
    """
    raise TypeError(f"a {type(information).__name__} information has no columns.")


@jax.jit
def conditional_mean(information: Any, kept: PyTree, vector: PyTree) -> PyTree:
    r"""The nearest vector with zeros in some places, as the information measures.

    .. math:: v_K + I_{KK}^{-1} I_{KS} v_S \text{ at the kept entries } K, \qquad
       0 \text{ at the others } S,

    the mean of :math:`\mathcal N(v, I^{-1})` given that the entries S are zero.
    `restrict` leaves whole arrays out and gives an information; this leaves out any
    entries and gives what is solved for.

    Args:
      information: I, of any structure.
      kept: a tree like the parameters, of booleans or of zeros and ones.
      vector: v, a tree like the parameters.

    Returns:
      A tree like the vector. Cost: conjugate gradients, which the inverse of the whole
      information preconditions: a product and a solve in each of about 20 (float32) to
      60 (float64), whatever the structure. NaN where it is not positive definite.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> kept = jnp.array([True, False])
      >>> print(ff.information.conditional_mean(information, kept, jnp.ones(2)))
      [1.5 0. ]
    """
    dtype = trees.float_dtype(information)

    def held(vector: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x, keep: keep.astype(dtype) * x.astype(dtype), vector, kept
        )

    def times(vector: PyTree) -> PyTree:
        return held(ops.matvec(information, vector))

    solve, start = ops.solver(information), held(vector)
    rest = jax.tree.map(lambda x, keep: x.astype(dtype) - keep, vector, start)
    tolerance = float(jnp.finfo(dtype).eps) ** 0.75
    step, _ = cg(
        times,
        times(rest),
        tol=tolerance,
        maxiter=_MOST,
        M=lambda vector: held(solve(vector)),
    )
    return jax.tree.map(jnp.add, start, step)

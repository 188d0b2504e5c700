"""What the data do not determine: directions in which an information is the prior's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.information import _operations as ops

PyTree = Any
Information = Any


class Directions(NamedTuple):
    """Directions in parameter space, that of the largest share first.

    Attributes:
      shares: `(d,)`, what part of the information along each is not the data's.
      vectors: leaves `(d, *leaf.shape)`, of unit length by the information.
    """

    shares: jax.Array
    vectors: PyTree


def null_directions(
    information: Information,
    precision: Information | None = None,
    like: PyTree | None = None,
    *,
    tolerance: float | None = None,
) -> Directions:
    r"""The directions in which the data say least, and the prior's share in each.

    .. math:: P v_k = \lambda_k I v_k, \qquad v_k^\top I v_k = 1,
       \qquad \lambda_1 \ge \dots \ge \lambda_d

    the eigenvalues of :math:`I^{-1/2} P I^{-1/2}`: 1 where the data say nothing, 0
    where the prior does not count; `d` less their sum is `effective`. What rounding may
    have made of nothing counts as nothing: P is raised by `tolerance` times the
    diagonal of I, and no eigenvalue of the equilibrated I (unit diagonal) is below it,
    so that units do not matter. Without a prior the shares are therefore 1 in the null
    space, and near 0 outside it.

    Args:
      information: I, with the prior in it.
      precision: P, the prior's part of it; None: I is of data alone.
      like: a tree with the parameters' shapes; only a structure that stores no shape
        needs it.
      tolerance: None: `d` times the rounding unit of the information's type.

    Returns:
      A `Directions(shares, vectors)`, d of each. Cost: the dense matrix, and the
      eigenvectors of two.

    Raises:
      ValueError: above 4,096 parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> prior = ff.structures.Scalar(jnp.array(0.5))
      >>> twice = ff.structures.Full(jnp.array([[9.5, 9.0], [9.0, 9.5]]))
      >>> found = ff.information.null_directions(twice, prior)
      >>> print(found.shares.round(3))  # of w[0] - w[1], and of w[0] + w[1]
      [1.    0.027]

    References:
      Golub, Van Loan, "Matrix Computations", 2013, section 8.7.
    """
    like = ops.shapes(information, like)
    matrix = ops.dense_matrix(information, like, "the null directions")
    prior = jnp.zeros_like(matrix)
    if precision is not None:
        prior = ops.to_dense(precision, like).astype(matrix.dtype)
    if tolerance is None:
        tolerance = len(matrix) * float(jnp.finfo(matrix.dtype).eps)
    shares, columns, scale = _split(matrix, prior, tolerance)
    return Directions(shares, trees.unravel((columns / scale[:, None]).T, like))


@jax.jit
def _split(
    matrix: jax.Array, prior: jax.Array, rounding: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shares, directions as columns in the units of `scale`, and these units."""
    tolerance = jnp.asarray(rounding, matrix.dtype)
    matrix, scale = linalg.equilibrated(matrix)
    unit = scale[:, None] * scale[None, :]
    values, basis = linalg.eigh(matrix)
    root = basis / jnp.sqrt(jnp.maximum(values, tolerance))[None, :]
    silent = prior / unit + tolerance * jnp.eye(len(matrix), dtype=matrix.dtype)
    shares, turn = linalg.eigh(root.T @ silent @ root)
    return jnp.clip(shares, 0, 1)[::-1], (root @ turn)[:, ::-1], scale


def is_estimable(
    information: Information,
    contrast: PyTree,
    precision: Information | None = None,
    *,
    tolerance: float | None = None,
) -> jax.Array:
    r"""Whether the data, rather than the prior, determine `contrast . theta`.

    .. math:: c^\top v_k = 0 \quad \text{for all } k \text{ with } \lambda_k > \tfrac12

    with the directions of `null_directions`. Without a prior that is the estimability
    of linear models: c lies in the row space of the design.

    Args:
      information: I, with the prior in it, or of data alone.
      contrast: c, a tree like the parameters.
      precision: P, the prior's part of it; None: I is of data alone.
      tolerance: as of `null_directions`; c may be off by its root, relative to c.

    Returns:
      A `()` bool. Cost: that of `null_directions`.

    Raises:
      ValueError: as `null_directions` does, and for a contrast of other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> twice = ff.structures.Full(jnp.array([[9.0, 9.0], [9.0, 9.0]]))
      >>> print(ff.information.is_estimable(twice, jnp.array([1.0, 1.0])))
      True
      >>> print(ff.information.is_estimable(twice, jnp.array([1.0, 0.0])))
      False

    References:
      Searle, "Linear Models", 1971, section 5.4.
    """
    contrast = jax.tree.map(jnp.asarray, contrast)
    like = jax.eval_shape(ops.diagonal, information, contrast)
    trees.check_shapes(contrast, like, "a contrast is a tree like the parameters")
    shares, vectors = null_directions(information, precision, like, tolerance=tolerance)
    rows = trees.ravel(vectors, 1)
    entries = trees.ravel(ops.diagonal(information, like)).astype(rows.dtype)
    scale = jnp.sqrt(jnp.where(entries > 0, entries, jnp.ones_like(entries)))
    # cosines in units in which the information has a unit diagonal
    directions = rows * scale[None, :]
    wanted = trees.ravel(contrast).astype(rows.dtype) / scale
    lengths = jnp.linalg.norm(directions, axis=1) * jnp.linalg.norm(wanted)
    if tolerance is None:
        tolerance = len(rows) * float(jnp.finfo(rows.dtype).eps)
    seen = jnp.abs(directions @ wanted) <= tolerance**0.5 * lengths
    return jnp.all(seen | (shares <= 0.5))

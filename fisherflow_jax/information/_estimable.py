"""What the data do not determine: directions in which an information is the prior's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax.information import _operations as ops

PyTree = Any
Information = Any


class Directions(NamedTuple):
    """Directions in parameter space, that of the largest share first.

    Made by `ff.information.null_directions`.

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


def efficient(
    information: Information,
    interest: PyTree,
    like: PyTree | None = None,
    *,
    tolerance: float | None = None,
) -> jax.Array:
    r"""The information about some parameters where all others are unknown too.

    .. math:: I_{\psi \cdot \lambda} = I_{\psi\psi}
       - I_{\psi\lambda} I_{\lambda\lambda}^{-1} I_{\lambda\psi}
       = (C I^{-1} C^\top)^{-1}

    Schur's complement of what is nuisance, or of combinations :math:`\psi = C \theta`.
    `restrict` is the information if the others were known. It is called the effective
    information too; `effective` here is a count of parameters. It is the inverse of
    `ff.geometry.cramer_rao`, and exists where that does not: along what the data do not
    determine it is zero, and what is redundant among the nuisance costs nothing.

    Args:
      information: I, of data alone or with a prior in it.
      interest: which parameters, by a list of names, one name or a predicate of them;
        or a contrast c, a tree like the parameters, for the information about
        :math:`c^\top \theta`; or k of these, leaves `(k, *leaf.shape)`.
      like: a tree with the parameters' shapes; a structure that stores no shape needs
        it.
      tolerance: of the equilibrated I, below which its eigenvalues count as nothing.
        None: `d` times the rounding unit of its type.

    Returns:
      A matrix `(k, k)`, of chosen parameters in ravelled order; of one contrast a
      number. Vmapped and compiled. Cost: the dense matrix, and the eigenvectors of
      one.

    Raises:
      ValueError: for names that there are not, for contrasts of other shapes, for some
        that are combinations of others (infinite or NaN under jit), and above 4,096
        parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[4.0, 2.0], [2.0, 2.0]]))
      >>> print(ff.information.efficient(information, jnp.array([1.0, 0.0])))
      2.0
      >>> twice = ff.structures.Full(jnp.array([[9.0, 9.0], [9.0, 9.0]]))
      >>> print(ff.information.efficient(twice, jnp.array([1.0, 0.0])))
      0.0
      >>> print(ff.information.efficient(twice, jnp.array([1.0, 1.0])))
      9.0

    References:
      Cox, Reid, "Parameter orthogonality and approximate conditional inference", 1987.
      van der Vaart, "Asymptotic Statistics", 1998, chapter 25.
    """
    like = ops.shapes(information, like)
    matrix = ops.dense_matrix(information, like, "the efficient information")
    rows, is_number = _contrasts(interest, like)
    matrix, scale = linalg.equilibrated(matrix)
    if tolerance is None:
        tolerance = len(matrix) * float(jnp.finfo(matrix.dtype).eps)
    k = len(rows)
    columns = rows.astype(matrix.dtype).T / scale[:, None]
    _check_independent(columns, tolerance)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    basis = linalg.orthonormal(jnp.concatenate([columns, identity], 1))
    triangle = linalg.product("ji,jk->ik", basis[:, :k], columns)
    turned = linalg.product("ji,jk,kl->il", basis, matrix, basis)
    values, vectors = linalg.eigh(turned[k:, k:])
    seen = values > tolerance
    crossed = vectors.T @ turned[k:, :k]
    weights = jnp.where(seen, 1 / jnp.where(seen, values, 1), 0)
    left = turned[:k, :k] - linalg.product("ji,j,jl->il", crossed, weights, crossed)
    values, vectors = linalg.eigh(left)
    values = jnp.where(values > tolerance, values, 0)
    root = linalg.solve(triangle, vectors)
    found = linalg.product("ij,j,kj->ik", root, values, root)
    return found[0, 0] if is_number else found


def _check_independent(columns: jax.Array, tolerance: jax.typing.ArrayLike) -> None:
    """Raises, where values are at hand, for contrasts one of which others make."""
    sizes = jnp.linalg.norm(columns, axis=0)
    unit = columns / jnp.where(sizes > 0, sizes, 1)[None, :]
    values = linalg.eigh(linalg.product("ji,jk->ik", unit, unit))[0]
    if not checks.holds(values[0] > tolerance):
        raise ValueError(
            f"{columns.shape[1]} contrasts of which some are combinations of the "
            "others, or zero, have no information of their own: give independent ones."
        )


def _contrasts(interest: PyTree, like: PyTree) -> tuple[jax.Array, bool]:
    """C as rows `(k, d)`, and whether it is one contrast."""
    names = isinstance(interest, (list, tuple)) and all(
        isinstance(name, str) for name in interest
    )
    if names or isinstance(interest, str) or callable(interest):
        chosen = jax.tree.map(
            lambda keep, leaf: jnp.full(leaf.shape, keep),
            trees.chosen(like, interest),
            like,
        )
        flags = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(chosen)])
        return jnp.eye(len(flags), dtype=trees.float_dtype(like))[flags], False
    interest = trees.real_arrays(interest, "a contrast")
    one = jax.tree.map(lambda x: x[None], interest)
    is_number = jax.tree.map(jnp.shape, interest) == jax.tree.map(jnp.shape, like)
    stacked = one if is_number else interest
    first = jax.tree.map(lambda x: x[0], stacked)
    trees.check_shapes(first, like, "contrasts are trees like the parameters")
    return trees.ravel(stacked, 1), is_number

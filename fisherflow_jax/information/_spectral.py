"""Eigenvalues and what is written once against them; roots, factors and parts.

Each operation has a default, through the dense matrix where there is no other way: a
structure that registers the required operations alone has all of these.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees
from fisherflow_jax.information import _operations as ops

PyTree = Any
Information = Any

# A matrix of this order takes 128 MiB in float64, and seconds for its eigenvalues.
LARGEST_DENSE = 4096
Parts = list[tuple[str, int]]  # of each leaf: its part, and d^3 of its matrices


class Facts(NamedTuple):
    """What other rooms may know of an information, beside its operations."""

    elementwise: bool = False
    """Its eigenvectors are the parameters: scalar, diagonal."""
    dense: bool = False
    """It keeps matrices, whose inverse follows the noise of a few random vectors."""
    layers: Any = None
    """The `Layers` by whose kernels it is kept, if it is."""


@functools.singledispatch
def facts(information: Information) -> Facts:
    """What is known of the structure of an information, from its type and shapes."""
    return Facts()


def provides(operation: Callable, information: Information) -> bool:
    """Whether the structure has this operation itself, and not by its default."""
    dispatch = operation.dispatch  # type: ignore[attr-defined]
    return dispatch(type(ops.plain(information))) is not dispatch(object)


def dense_matrix(information: Information, like: PyTree | None, what: str) -> jax.Array:
    """`to_dense` for a default, refused where it is too large.

    Raises:
      ValueError: above 4,096 parameters, with the bytes that the matrix would take.
    """
    wanted = jax.eval_shape(lambda i: ops.to_dense(i, like), information)
    count = wanted.shape[0]
    if count > LARGEST_DENSE:
        raise ValueError(
            f"{what} of a {type(information).__name__} information of {count} "
            f"parameters would take its dense matrix, {count * count} numbers or "
            f"{count * count * wanted.dtype.itemsize:,} bytes, and is refused above "
            f"{LARGEST_DENSE} parameters: take a part of the parameters, or a "
            "diagonal, block or kronecker structure."
        )
    return ops.to_dense(information, like)


def nothing_to_spread(what: str) -> ValueError:
    return ValueError(
        "spread_inverses=True renews layers or blocks by turns: of "
        f"{what} there is nothing to spread. It is for the structures kronecker and "
        "block."
    )


# ---- eigenvalues


class Spectral(NamedTuple):
    r"""The operator :math:`B \, \mathrm{diag}(\lambda) \, B^\top`, a pytree of arrays.

    `basis.into(v)` is :math:`B^\top v`, `basis.out_of(c, like)` is :math:`B c`, a tree
    like the parameters, and `basis.laid_out(v)` has the entries of `v` in the places of
    coordinates, without a turn. The values are a tree like the coordinates, or a prefix
    of it (one number for all of them).
    """

    values: PyTree
    basis: Any

    def times(self, vector: PyTree) -> PyTree:
        """`B diag(values) B^T v`, like the vector."""
        return self._turn(jnp.multiply, vector)

    def divide(self, vector: PyTree) -> PyTree:
        """`B diag(1 / values) B^T v`, like the vector."""
        return self._turn(jnp.divide, vector)

    def _turn(self, function: Callable, vector: PyTree) -> PyTree:
        coordinates = self.basis.into(vector)
        return self.basis.out_of(self._each(function, coordinates), vector)

    def quotient(self, coordinates: PyTree) -> PyTree:
        """Coordinates divided by the values."""
        return self._each(jnp.divide, coordinates)

    def _each(self, function: Callable, coordinates: PyTree) -> PyTree:
        def leaf(value: jax.Array, part: PyTree) -> PyTree:
            return jax.tree.map(lambda x: function(x.astype(value.dtype), value), part)

        return jax.tree.map(leaf, _beside(self.values, coordinates), coordinates)

    def map(self, function: Callable, *trees_: PyTree) -> "Spectral":
        """`B diag(f(values)) B^T`."""
        return Spectral(jax.tree.map(function, self.values, *trees_), self.basis)

    def expanded(self, like: PyTree) -> list[jax.Array]:
        """All eigenvalues, each as often as it occurs; `like` the parameters."""
        shapes = jax.eval_shape(self.basis.into, like)
        filled = jax.tree.map(
            lambda value, part: jax.tree.map(
                lambda x: jnp.broadcast_to(value, x.shape), part
            ),
            _beside(self.values, shapes),
            shapes,
        )
        return jax.tree.leaves(filled)


def _beside(values: PyTree, coordinates: PyTree) -> PyTree:
    # a tree with holes has no coordinates of what is hidden
    if isinstance(values, dict) and isinstance(coordinates, dict):
        return {name: values[name] for name in coordinates}
    return values


class Parameters(NamedTuple):
    """The basis of the parameters themselves: nothing is turned."""

    def into(self, vector: PyTree) -> PyTree:
        return vector

    def out_of(self, coordinates: PyTree, like: PyTree) -> PyTree:
        return coordinates

    def laid_out(self, vector: PyTree) -> PyTree:
        return vector

    def parts(self, values: PyTree) -> "Parts":
        raise nothing_to_spread("an elementwise information")


class Columns(NamedTuple):
    """Eigenvectors as the columns of one matrix."""

    columns: jax.Array  # (d, d)

    def into(self, vector: PyTree) -> jax.Array:
        return self.laid_out(vector) @ self.columns

    def out_of(self, coordinates: jax.Array, like: PyTree) -> PyTree:
        return trees.unravel(self.columns @ coordinates, like)

    def parts(self, values: PyTree) -> "Parts":
        raise nothing_to_spread("one matrix")

    def laid_out(self, vector: PyTree) -> jax.Array:
        return trees.ravel(vector).astype(self.columns.dtype)


@functools.singledispatch
def spectral(information: Information, like: PyTree | None = None) -> Spectral:
    r"""The eigenvalues, and the turn into their basis: `Spectral(values, basis)`.

    Powers, roots and determinants follow from it: `spectral(I).map(f).times(v)` is
    :math:`f(I) v`. With a tree that has holes as `like`, what is hidden is left out of
    what is summed and multiplied.

    Args:
      information: of any structure.
      like: a tree with the parameters' shapes, for structures that store none.

    Returns:
      A `Spectral`. Scalar and diagonal: their own numbers. Full and block: an
      eigendecomposition of each block. Kronecker: of its two factors. All others (low
      rank, a structure of one's own that does not register it): of the dense matrix.

    Raises:
      ValueError: where a dense matrix of more than 4,096 parameters would be needed,
        with its bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> found = ff.information.spectral(information)
      >>> print(found.values.round(3))
      [1. 3.]
      >>> root = found.map(jnp.sqrt)
      >>> print(root.times(root.times(jnp.array([1.0, 0.0]))).round(3))
      [2. 1.]
    """
    matrix = dense_matrix(information, like, "the eigenvalues")
    return Spectral(*_eigh(matrix))


def _eigh(matrix: jax.Array) -> tuple[jax.Array, Columns]:
    values, columns = jnp.linalg.eigh(matrix)
    # rounding brings the smallest eigenvalues of a singular matrix below zero
    return jnp.maximum(values, 0), Columns(columns)


@functools.singledispatch
def eigenvalues(
    information: Information, like: PyTree | None = None
) -> list[jax.Array]:
    """All eigenvalues, in no order, in arrays that together have d entries."""
    if not provides(spectral, information):
        return [jnp.linalg.eigvalsh(dense_matrix(information, like, "the eigenvalues"))]
    found = spectral(information, like)
    if like is None:
        like = jax.eval_shape(ops.diagonal, information)
    return found.expanded(like)


def determinant(
    information: Information, precision: Information, like: PyTree
) -> Callable[[Information, jax.Array], jax.Array]:
    r"""The log-determinant :math:`\log |s F + P|` as a function of `(P, s)`.

    What does not depend on them is computed once: where the structure has its
    eigenvalues and P is diagonal in their basis, each further value is a sum of
    logarithms. Elsewhere it is `logdet` of the sum.

    Args:
      information: F.
      precision: P as an information. What counts is its form, not its numbers: scalar
        and diagonal are diagonal in the basis of the parameters, scalar in every one,
        and one number a layer (see `check_prior`) in that of a Kronecker information.
      like: a tree with the parameters' shapes.
    """
    information, known = ops.plain(information), facts(information)
    is_number = False
    if facts(precision).elementwise:
        values = spectral(precision, like).values
        is_number = trees.is_leaf(values) and jnp.ndim(values) == 0
    aligned = facts(precision).elementwise and (
        known.elementwise or known.layers is not None
    )
    if not provides(spectral, information) or not (aligned or is_number):
        return lambda precision, factor: ops.logdet(
            ops.add(ops.scale(information, factor), precision), like
        )
    found = spectral(information, like)
    values = found.expanded(like)

    def by_eigenvalues(precision: Information, factor: jax.Array) -> jax.Array:
        entries = found.basis.laid_out(ops.diagonal(precision, like))
        pairs = zip(values, jax.tree.leaves(entries), strict=True)
        logs = [jnp.sum(jnp.log(factor * value + entry)) for value, entry in pairs]
        return sum(logs[1:], start=logs[0])

    return by_eigenvalues


@functools.singledispatch
def check_prior(information: Information, prior: PyTree, like: PyTree) -> None:
    """Raises where a prior of numbers is none that the structure can hold exactly.

    A Kronecker information takes one number a layer, the same for kernel and bias:
    by the numbers where they are at hand, else by where they stand in the tree.
    """


@functools.singledispatch
def check_like(information: Information, params: PyTree) -> None:
    """Raises where an information kept by layers is about another tree than `params`.

    By name and shape; leaves may be missing.
    """


def effective(
    information: Information, precision: Information, like: PyTree | None = None
) -> jax.Array:
    r"""How many parameters the data rather than the prior determine.

    .. math:: \gamma = d - \mathrm{tr}(P I^{-1}) = \mathrm{tr}(F (F + P)^{-1}),
       \qquad I = F + P

    Args:
      information: I, with the prior in it, as a state keeps it.
      precision: P, the prior's share, as an information of any structure.
      like: a tree with the parameters' shapes; only a structure that stores no shape
        needs it.

    Returns:
      A number between 0 and d. Cost: the diagonals of P and of the inverse where P is
      scalar or diagonal, else d solves.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> prior = ff.structures.Scalar(jnp.array(1.0))
      >>> information = ff.structures.Diagonal(jnp.array([1.0, 2.0, 10.0]))
      >>> print(ff.information.effective(information, prior).round(3))
      1.4

    References:
      MacKay, "Bayesian interpolation", 1992.
    """
    if like is None:
        like = jax.eval_shape(ops.diagonal, information)
    count = jnp.asarray(trees.size(like), trees.float_dtype(like))
    if facts(precision).elementwise:
        prior = trees.ravel(ops.diagonal(precision, like))
        held = jnp.sum(prior * trees.ravel(ops.inverse_diagonal(information, like)))
    else:
        solve = ops.solver(information)
        rows = trees.unravel(ops.to_dense(precision, like), like)
        held = jnp.trace(trees.ravel(jax.vmap(solve)(rows), 1))
    # a memory that forgets its prior may believe less than the prior did
    return count - jnp.minimum(held, count)


# ---- roots


class Whitener(NamedTuple):
    r"""A root of the inverse, :math:`R^\top R = I^{-1}`, factorised once."""

    rows: Callable[[PyTree], PyTree]
    """Vectors, leaves `(k, *leaf.shape)` -> `R v` of each, leaves `(k, ...)`."""
    color: Callable[[PyTree], PyTree]
    """`z`, as `R v` of one vector -> `R^T z`, like the parameters."""
    laid_out: Callable[[PyTree], PyTree]
    """A tree like the parameters -> its entries in the places of `R v`."""

    def matrix(self, stack: PyTree) -> jax.Array:
        """`R v` of k vectors as one array `(k, q)`.

        `matrix(chosen) @ matrix(many).T` are the products `v_i^T I^-1 v_j` of chosen
        with many, and `matrix(many) @ matrix(one)[0]` is one column of them.
        """
        return trees.ravel(self.rows(stack), 1)


@functools.singledispatch
def whitener(
    information: Information,
    damping: jax.typing.ArrayLike = 0.0,
    like: PyTree | None = None,
) -> Whitener:
    r"""A root R of :math:`(I + \lambda 1)^{-1} = R^\top R`, applied to many vectors.

    Which root is the structure's choice: the Cholesky factor of full and block, the
    inverse roots of eigenvalues for scalar, diagonal and kronecker, the symmetric root
    of low rank. The default is that of `spectral`.

    Args:
      information: of any structure.
      damping: `lambda`.
      like: a tree with the parameters' shapes, for structures that store none.

    Returns:
      A `Whitener`, whose functions close over what was factorised. Cost: that of
      `solver`, once; of a vector about half a solve.

    Raises:
      ValueError: as `spectral` does, where the structure has no root of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
      >>> white = ff.information.whitener(information)
      >>> chosen, many = jnp.array([[2.0, 1.0]]), jnp.eye(2)
      >>> print(white.matrix(chosen) @ white.matrix(many).T)
      [[0.5 1. ]]
    """
    found = spectral(information, like).map(lambda value: jnp.sqrt(value + damping))

    def color(coordinates: PyTree) -> PyTree:
        template = like
        if template is None and not facts(information).elementwise:
            template = jax.eval_shape(ops.diagonal, information)
        return found.basis.out_of(found.quotient(coordinates), template)

    def white(vector: PyTree) -> PyTree:
        return found.quotient(found.basis.into(vector))

    return Whitener(jax.vmap(white), color, found.basis.laid_out)


def whiten(
    information: Information, vector: PyTree, like: PyTree | None = None
) -> PyTree:
    r"""`R v` with :math:`R^\top R = I^{-1}`: coordinates of unit covariance.

    A tree of arrays, in whatever order the structure likes; `whitener` serves many
    vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([4.0, 1.0]))
      >>> ff.information.whiten(information, jnp.array([2.0, 1.0]))
      Array([1., 1.], dtype=float32)
    """
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], vector)
    white = whitener(information, like=vector if like is None else like)
    return jax.tree.map(lambda x: x[0], white.rows(one))


def color(information: Information, vector: PyTree, like: PyTree | None = None):
    r"""`R^T z`, with R and z as of `whiten`: `color(whiten(v))` is `solve(v)`.

    Of a z with unit covariance the result has the covariance :math:`I^{-1}`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([4.0, 1.0]))
      >>> ff.information.color(information, jnp.array([2.0, 1.0]))
      Array([1., 1.], dtype=float32)
    """
    return whitener(information, like=like).color(vector)


@functools.singledispatch
def sample(
    information: Information, key: jax.Array, like: PyTree | None = None
) -> PyTree:
    """A draw of `N(0, I^-1)`, a pytree like the parameters."""
    template = jax.eval_shape(lambda i: ops.diagonal(i, like), information)
    white = whitener(information, like=template)
    return white.color(white.laid_out(trees.standard_normal(key, template)))


# ---- factors that a state can keep


class Unfactorised(NamedTuple):
    """Solved anew for each vector: it costs little more than keeping factors."""

    solved: Information
    solved_damping: jax.Array  # ()

    def divide(self, vector: PyTree) -> PyTree:
        """`(I + damping 1)^-1 v`."""
        return ops.solve(self.solved, vector, self.solved_damping)


@functools.singledispatch
def factorise(information: Information, damping: jax.Array) -> Any:
    """What `solver` needs, as a pytree of arrays with a method `divide(vector)`.

    Full and block: Cholesky factors. Structures that have their eigenvalues: these,
    damped, as a `Spectral`. All others are solved anew for each vector.
    """
    if provides(spectral, information):
        return spectral(information).map(lambda value: value + damping)
    return Unfactorised(information, damping)


@functools.singledispatch
def factored(information: Information, damping: jax.Array) -> Any:
    """As `factorise`, but that each Kronecker factor is damped and not their product.

    Only structures of Kronecker factors provide it.
    """
    raise TypeError(f"a {type(information).__name__} information has no factors.")


@functools.singledispatch
def parts(factors: Any) -> Parts:
    """Which part each leaf of factors belongs to, and the cost of making it.

    A part is a layer or a block that can be renewed without the others; the cost is
    d^3 for each of its matrices, 0 for what is no matrix. In the order of
    `jax.tree.leaves`. A `Spectral` has those of its basis.

    Raises:
      ValueError: for factors that have no such parts.
    """
    raise nothing_to_spread(f"a {type(factors).__name__}")


@parts.register
def _(factors: Spectral) -> Parts:
    return factors.basis.parts(factors.values)


@functools.singledispatch
def restrict(information: Information, shown: PyTree, like: PyTree | None = None):
    """The information about some parameters, the others being held.

    Rows and columns of what `shown` shows, a tree like the parameters with
    `optax.MaskedNode` at what is held; kept in the structure that the information has,
    about a tree with these holes. One number for all parameters, and layers by name,
    fit such a tree as they are.

    Args:
      information: of any structure.
      shown: a tree with the parameters' shapes, and holes.
      like: the whole tree, for structures that store no shape.

    Returns:
      An information. A structure that does not register it returns a `Full`, by its
      dense matrix; `Structure.restrict` brings that back into the structure.

    Raises:
      ValueError: where a dense matrix of more than 4,096 parameters would be needed,
        with its bytes.
    """
    raise TypeError(
        f"a {type(information).__name__} information has no restriction to some of "
        "the parameters."
    )

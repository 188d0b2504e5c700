"""What is written once against the contract: roots, factors, determinants, parts.

Each has a default, through the dense matrix where there is no other way: a structure
that registers the required operations alone has all of these.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.information import _operations as ops
from fisherflow_jax.information._basis import (
    Floored,
    Parts,
    Spectral,
    nothing_to_spread,
)

PyTree = Any
Information = Any


@functools.singledispatch
def eigenvalues(
    information: Information, like: PyTree | None = None
) -> list[jax.Array]:
    """All eigenvalues, in no order, in arrays that together have d entries.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([2.0, 4.0]))
      >>> ff.information.eigenvalues(information)
      [Array([2., 4.], dtype=float32)]
    """
    if not ops.provides(ops.spectral, information):
        matrix = ops.dense_matrix(information, like, "the eigenvalues")
        return [linalg.eigh(matrix)[0]]
    found = ops.spectral(information, like)
    return found.expanded(ops.shapes(information, like))


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

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> of = ff.information.determinant(
      ...     ff.structures.Diagonal(jnp.ones(2)),
      ...     ff.structures.Scalar(jnp.ones(())),
      ...     jnp.zeros(2),
      ... )
      >>> of(ff.structures.Scalar(jnp.array(3.0)), 1.0).round(4)  # log |1 + 3|, twice
      Array(2.7726, dtype=float32)
    """
    information, known = ops.plain(information), ops.facts(information)
    is_number = False
    if ops.facts(precision).elementwise:
        values = ops.spectral(precision, like).values
        is_number = trees.is_leaf(values) and jnp.ndim(values) == 0
    aligned = ops.facts(precision).elementwise and (
        known.elementwise or known.layers is not None
    )
    if not ops.provides(ops.spectral, information) or not (aligned or is_number):
        return lambda precision, factor: ops.logdet(
            ops.add(ops.scale(information, factor), precision), like
        )
    found = ops.spectral(information, like)
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

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.ones(2))
      >>> ff.information.check_prior(
      ...     information, jnp.array([1.0, 2.0]), jnp.zeros(2)
      ... )  # it can
    """


@functools.singledispatch
def check_like(information: Information, params: PyTree) -> None:
    """Raises where an information kept by layers is about another tree than `params`.

    By name and shape; leaves may be missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.ones(2))
      >>> ff.information.check_like(
      ...     information, jnp.zeros(2)
      ... )  # about no layers: nothing to say
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
    like = ops.shapes(information, like)
    count = jnp.asarray(trees.size(like), trees.float_dtype(like))
    if ops.facts(precision).elementwise:
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
    r"""A root of the inverse, :math:`R^\top R = I^{-1}`, factorised once.

    Made by `ff.information.whitener`.

    Attributes:
      rows: vectors, leaves `(k, *leaf.shape)` -> `R v` of each, leaves `(k, ...)`.
      color: `z`, as `R v` of one vector -> `R^T z`, like the parameters.
      laid_out: a tree like the parameters -> its entries in the places of `R v`.
    """

    rows: Callable[[PyTree], PyTree]
    color: Callable[[PyTree], PyTree]
    laid_out: Callable[[PyTree], PyTree]

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
    found = ops.spectral(information, like).map(lambda value: jnp.sqrt(value + damping))

    def color(coordinates: PyTree) -> PyTree:
        template = like
        if template is None and not ops.facts(information).elementwise:
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
    """A draw of `N(0, I^-1)`, a pytree like the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal({"w": jnp.full(1000, 4.0)})
      >>> draw = ff.information.sample(information, jax.random.key(0))
      >>> print(draw["w"].shape, draw["w"].std().round(1))
      (1000,) 0.5
    """
    template = jax.eval_shape(lambda i: ops.diagonal(i, like), information)
    white = whitener(information, like=template)
    return white.color(white.laid_out(trees.standard_normal(key, template)))


# ---- factors that a state can keep


class Unfactorised(NamedTuple):
    """Solved anew for each vector: it costs little more than keeping factors.

    Made by `ff.information.factorise`.
    """

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

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 1.0]]))
      >>> factors = ff.information.factorise(information, 0.0)
      >>> print(factors.divide(jnp.array([1.0, 0.0])).round(3))
      [ 1. -1.]
    """
    if ops.provides(ops.spectral, information):
        return ops.spectral(information).map(lambda value: value + damping)
    return Unfactorised(information, damping)


@functools.singledispatch
def factored(information: Information, damping: jax.Array) -> Any:
    """As `factorise`, but that each Kronecker factor is damped and not their product.

    Only structures of Kronecker factors provide it.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, x):
      ...     return x @ params["w"]
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.eye(2)
      >>> structure = ff.structures.kronecker(
      ...     ff.layers.find_layers(apply_fn, params, x)
      ... )
      >>> estimator = ff.estimators.exact(
      ...     apply_fn, ff.likelihoods.gaussian(), structure
      ... )
      >>> factors = ff.information.factored(estimator(params, (x, None)), 1e-4)
      >>> print(factors.divide(params)["w"].shape)
      (2, 1)
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

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.block().reduce({"w": jnp.ones((1, 3, 2))})
      >>> len(ff.information.parts(ff.information.factorise(information, 0.1)))
      2
    """
    raise nothing_to_spread(f"a {type(factors).__name__}")


@parts.register
def _(factors: Spectral) -> Parts:
    return factors.basis.parts(factors.values)


@parts.register
def _(factors: Floored) -> Parts:
    return [*parts(factors.spectrum), *((name, 0) for name in sorted(factors.raised))]

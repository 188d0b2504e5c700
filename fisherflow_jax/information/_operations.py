"""The contract: what can be asked of any information, dispatched on its type."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax.information._basis import Columns, Spectral

PyTree = Any
Information = Any

# A matrix of this order takes 128 MiB in float64, and seconds for its eigenvalues.
LARGEST_DENSE = 4096
# Of so many parameters, directions are looked for and named.
LARGEST_NAMED = 500


def _unsupported(operation: str, information: Any) -> TypeError:
    return TypeError(
        f"information.{operation} knows no structure of type "
        f"{type(information).__name__}; an information is what an estimator returns "
        "or a state's .information."
    )


class Facts(NamedTuple):
    """What other rooms may know of an information, beside its operations.

    Made by `ff.information.facts`.

    Attributes:
      elementwise: its eigenvectors are the parameters: scalar, diagonal.
      dense: it keeps matrices, whose inverse follows the noise of a few random
        vectors.
      layers: the `Layers` by whose kernels it is kept, if it is.
      additive: its sums, by `fuse`, are those of the operators.
      whole: it keeps all products of parameters, so that what a row adds to a sum is
        the row's own information.
    """

    elementwise: bool = False
    dense: bool = False
    layers: Any = None
    additive: bool = True
    whole: bool = False


@functools.singledispatch
def facts(information: Information) -> Facts:
    """What is known of the structure of an information, from its type and shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.information.facts(ff.structures.Diagonal(jnp.ones(2))).elementwise
      True
    """
    return Facts()


def provides(operation: Callable, information: Information) -> bool:
    """Whether the structure has this operation itself, and not by its default.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.ones(2))
      >>> ff.information.provides(ff.information.spectral, information)
      True
    """
    dispatch = operation.dispatch  # type: ignore[attr-defined]
    return dispatch(type(plain(information))) is not dispatch(object)


def dense_matrix(information: Information, like: PyTree | None, what: str) -> jax.Array:
    """`to_dense` for a default, refused where it is too large.

    Raises:
      ValueError: above 4,096 parameters, with the bytes that the matrix would take.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([2.0, 4.0]))
      >>> ff.information.dense_matrix(information, None, "an operation of one's own")
      Array([[2., 0.],
             [0., 4.]], dtype=float32)
    """
    wanted = jax.eval_shape(lambda i: to_dense(i, like), information)
    count = wanted.shape[0]
    if count > LARGEST_DENSE:
        raise ValueError(
            f"{what} of a {type(information).__name__} information of {count} "
            f"parameters would take its dense matrix, {count * count} numbers or "
            f"{count * count * wanted.dtype.itemsize:,} bytes, and is refused above "
            f"{LARGEST_DENSE} parameters: take a part of the parameters, or a "
            "diagonal, block or kronecker structure."
        )
    return to_dense(information, like)


def is_information(value: Any) -> bool:
    """Whether a value is of a type that a structure has registered.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.ones(2))
      >>> print(
      ...     ff.information.is_information(information),
      ...     ff.information.is_information(1.0),
      ... )
      True False
    """
    return provides(matvec, value) or provides(spectral, value)


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
    if not is_information(information):
        raise _unsupported("spectral", information)
    matrix = dense_matrix(information, like, "the eigenvalues")
    return Spectral(*_eigh(matrix))


def _eigh(matrix: jax.Array) -> tuple[jax.Array, Columns]:
    values, columns = linalg.eigh(matrix)
    # rounding brings the smallest eigenvalues of a singular matrix below zero
    return jnp.maximum(values, 0), Columns(columns)


def _own(
    information: Information, operation: str, like: PyTree | None = None
) -> Spectral:
    """The spectrum by which an operation works that the structure does not register."""
    if not provides(spectral, information):
        raise _unsupported(operation, information)
    return spectral(information, like)


def shapes(information: Information, like: PyTree | None) -> PyTree:
    """`like`, or else the shapes of the parameters as the information stores them.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.information.shapes(ff.structures.Diagonal({"w": jnp.ones(2)}), None)
      {'w': ShapeDtypeStruct(shape=(2,), dtype=float32)}
    """
    return jax.eval_shape(diagonal, information) if like is None else like


@functools.singledispatch
def matvec(information: Information, vector: PyTree) -> PyTree:
    """The product `I v`, a pytree like `vector`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([1.0, 2.0]))
      >>> ff.information.matvec(information, jnp.array([3.0, 4.0]))
      Array([3., 8.], dtype=float32)
    """
    return _own(information, "matvec").times(vector)


@functools.singledispatch
def solver(
    information: Information, damping: jax.typing.ArrayLike = 0.0
) -> Callable[[PyTree], PyTree]:
    """Factorises once and returns the function `v -> (I + damping 1)^-1 v`.

    Dense matrices are factorised by Cholesky after equilibration (a unit diagonal),
    so that parameters of very different scale cost no digits. An operator that is not
    positive definite gives NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 1.0]]))
      >>> divide = ff.information.solver(information)
      >>> print(
      ...     divide(jnp.array([1.0, 0.0])).round(3),
      ...     divide(jnp.array([0.0, 1.0])).round(3),
      ... )
      [ 1. -1.] [-1.  2.]
    """
    return _own(information, "solver").map(lambda x: x + damping).divide


def solve(
    information: Information, vector: PyTree, damping: jax.typing.ArrayLike = 0.0
) -> PyTree:
    """The solution `x` of `(I + damping 1) x = v`.

    Raises:
      ValueError: outside jit, where the operator is not positive definite in its
        precision, with the direction along which it is least so; under jit NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([1.0, 3.0]))
      >>> ff.information.solve(information, jnp.array([4.0, 8.0]), damping=1.0)
      Array([2., 2.], dtype=float32)
    """
    solution = solver(information, damping)(vector)
    if not checks.is_traced((solution, vector)):
        finite = trees.all_finite(solution), trees.all_finite(vector)
        if bool(~finite[0] & finite[1]):
            raise ValueError(_indefinite(information, vector))
    return solution


def _indefinite(information: Information, like: PyTree) -> str:
    """What is wrong with an information that has no Cholesky factor."""
    dtype = trees.float_dtype(like)
    what = f"the information is not positive definite in {dtype}"
    if trees.size(like) <= LARGEST_NAMED:
        matrix, scales = linalg.equilibrated(to_dense(information, like))
        direction = linalg.eigh(matrix)[1][:, 0] / scales
        direction = direction / jnp.max(jnp.abs(direction))
        pairs = zip(direction, trees.entry_names(like), strict=True)
        terms = [f"{float(x):+.3g} {name}" for x, name in pairs if abs(x) > 1e-3]
        what = f"{what}, least of all along {' '.join(terms)}"
    return (
        f"{what}: give a damping or a larger prior precision, leave a column out, or "
        "compute in float64."
    )


def _sum(
    function: Callable, information: Information, operation: str, like: PyTree | None
) -> jax.Array:
    """The sum of `function(value)` over all eigenvalues."""
    found = _own(information, operation, like)
    sums = [jnp.sum(function(x)) for x in found.expanded(shapes(information, like))]
    return sum(sums, start=jnp.zeros((), trees.float_dtype(found.values)))


@functools.singledispatch
def logdet(information: Information, like: PyTree | None = None) -> jax.Array:
    """The log-determinant `log |I|`, a number.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal({"w": jnp.array([2.0, 4.0])})
      >>> ff.information.logdet(information).round(4)
      Array(2.0794, dtype=float32)
    """
    return _sum(jnp.log, information, "logdet", like)


@functools.singledispatch
def trace(information: Information, like: PyTree | None = None) -> jax.Array:
    """The trace of `I`, a number.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.information.trace(ff.structures.Diagonal({"w": jnp.array([2.0, 4.0])}))
      Array(6., dtype=float32)
    """
    return _sum(jnp.asarray, information, "trace", like)


@functools.singledispatch
def diagonal(information: Information, like: PyTree | None = None) -> PyTree:
    """The diagonal of `I`, a pytree like the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 3.0]]))
      >>> ff.information.diagonal(information)
      Array([2., 3.], dtype=float32)
    """
    found = _own(information, "diagonal", like)
    return found.basis.diagonal(found.values, like)


@functools.singledispatch
def inverse_diagonal(information: Information, like: PyTree | None = None) -> PyTree:
    """The diagonal of `I^-1`: the variance of each parameter, a pytree like them.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 1.0]]))
      >>> print(ff.information.inverse_diagonal(information).round(3))
      [1. 2.]
    """
    found = _own(information, "inverse_diagonal", like).map(lambda x: 1 / x)
    return found.basis.diagonal(found.values, like)


@functools.singledispatch
def to_dense(information: Information, like: PyTree | None = None) -> jax.Array:
    """The matrix `(d, d)` in the order of `jax.tree.leaves`, each leaf ravelled.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Scalar(jnp.array(2.0))
      >>> ff.information.to_dense(information, like={"w": jnp.zeros(2)})
      Array([[2., 0.],
             [0., 2.]], dtype=float32)
    """
    found = _own(information, "to_dense", like)
    like = shapes(information, like)
    units = jnp.eye(trees.size(like), dtype=trees.float_dtype(found.values))
    matrix = trees.ravel(jax.vmap(found.times)(trees.unravel(units, like)), 1)
    return (matrix + matrix.T) / 2


def quadratic_form(information: Information, vector: PyTree) -> jax.Array:
    """The number `v^T I v`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 3.0]]))
      >>> ff.information.quadratic_form(information, jnp.array([1.0, 2.0]))
      Array(18., dtype=float32)
    """
    return trees.dot(vector, matvec(information, vector))


def add(left: Information, right: Information) -> Information:
    """The sum of two informations.

    Equal types add. A simpler structure (scalar, diagonal) may be added to a richer
    one; the result has the richer type. A low-rank sum is recompressed to its rank.

    Raises:
      TypeError: if neither structure can hold the other.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> rows = ff.structures.Full(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> ff.information.add(rows, ff.structures.Scalar(jnp.array(1.0))).rows
      Array([[3., 1.],
             [1., 3.]], dtype=float32)
    """
    # the operands' order is kept where both sides know each other: under jit, fused
    # multiply-add makes it matter for the last bit
    result = add_to(left, right)
    if result is NotImplemented:
        result = add_to(right, left)
    if result is NotImplemented:
        raise TypeError(
            f"an information of type {type(left).__name__} and one of type "
            f"{type(right).__name__} do not add: neither structure can hold the other. "
            "Measure both with one structure, or keep of one only its diagonal: "
            "ff.structures.Diagonal(ff.information.diagonal(information))."
        )
    return result


@functools.singledispatch
def add_to(left: Information, right: Information) -> Information:
    """`left + right` in the type of `left`, or NotImplemented.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> left, right = (
      ...     ff.structures.Full(jnp.eye(2)),
      ...     ff.structures.Diagonal(jnp.ones(2)),
      ... )
      >>> ff.information.add_to(left, right).rows
      Array([[2., 0.],
             [0., 2.]], dtype=float32)
    """
    raise _unsupported("add", left)


@functools.singledispatch
def scale(information: Information, factor: jax.typing.ArrayLike) -> Information:
    """The information `factor * I`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.information.scale(
      ...     ff.structures.Diagonal(jnp.array([2.0, 4.0])), 0.5
      ... ).entries
      Array([1., 2.], dtype=float32)
    """
    raise _unsupported("scale", information)


@functools.singledispatch
def total(stacked: Information, weights: jax.Array) -> Information:
    """The sum of `weights[k] * I_k` over a stack with leaves `(k, ...)`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> stacked = ff.structures.Diagonal(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> ff.information.total(stacked, jnp.array([1.0, 10.0])).entries
      Array([31., 42.], dtype=float32)
    """
    raise _unsupported("total", stacked)


@functools.singledispatch
def fuse(start: Information, parts: Sequence[Information]) -> Information:
    """The sum `I_s + sum_k (I_k - I_s)` of what the parts added to the start.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> one = lambda value: ff.structures.Scalar(jnp.array(value))
      >>> ff.information.fuse(one(1.0), [one(3.0), one(4.0)])  # 1 + 2 + 3
      Scalar(value=Array(6., dtype=float32))
    """
    fused = start
    for part in parts:
        fused = add(add(fused, part), scale(start, -1.0))
    return fused


@functools.singledispatch
def inverse(information: Information) -> Information:
    """The inverse `I^-1` in the same structure (scalar, diagonal, block, full).

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.information.inverse(ff.structures.Diagonal(jnp.array([2.0, 4.0]))).entries
      Array([0.5 , 0.25], dtype=float32)
    """
    raise _unsupported("inverse", information)


@functools.singledispatch
def sandwich(information: Information, meat: Information) -> Information:
    """The sandwich `I^-1 M I^-1` of two informations of the same structure.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> diagonal = lambda *entries: ff.structures.Diagonal(jnp.array(entries))
      >>> ff.information.sandwich(
      ...     diagonal(2.0, 4.0), diagonal(4.0, 4.0)
      ... ).entries  # M / I^2
      Array([1.  , 0.25], dtype=float32)
    """
    raise _unsupported("sandwich", information)


@functools.singledispatch
def squares(information: Information, vectors: PyTree) -> Information:
    """What the structure of `information` keeps of `sum_k v_k v_k^T`.

    `vectors` has leaves `(k, *leaf.shape)`; the values of `information` are not read.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.zeros(2))
      >>> ff.information.squares(
      ...     information, jnp.array([[1.0, 2.0], [3.0, 0.0]])
      ... ).entries
      Array([10.,  4.], dtype=float32)
    """
    raise _unsupported("squares", information)


@functools.singledispatch
def propagate(
    information: Information, noise: Any, transition: Any | None = None
) -> Information:
    """The prediction step `(A I^-1 A^T + Q)^-1` of a Kalman filter.

    `noise` is Q and `transition` is A (None: the identity): each a `Scalar`, a
    `Diagonal`, or a matrix `(d, d)` in ravelled order.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[2.0]]))
      >>> ff.information.propagate(
      ...     information, ff.structures.Scalar(jnp.array(0.5))
      ... ).rows  # 1 / (1/2 + 1/2)
      Array([[1.]], dtype=float32)
    """
    raise _unsupported("propagate", information)


@functools.singledispatch
def is_finite(information: Information) -> jax.Array:
    """Whether all that is kept is finite, `()` bool.

    Of a Gram matrix the diagonal tells it, which bounds all other entries.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.information.is_finite(ff.structures.Diagonal(jnp.array([2.0, jnp.nan])))
      Array(False, dtype=bool)
    """
    return trees.all_finite(information)


@functools.singledispatch
def conform(template: Information, information: Information) -> Information:
    """`information` in the representation of `template` (compensated or plain).

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.eye(1))
      >>> compensated = ff.structures.Compensated(
      ...     information, ff.structures.Full(jnp.zeros((1, 1)))
      ... )
      >>> type(ff.information.conform(compensated, information)).__name__
      'Compensated'
    """
    return information


@functools.singledispatch
def plain(information: Information) -> Information:
    """The information itself: as `rounded`, and where its inverse is kept, of that.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.eye(1))
      >>> ff.information.plain(information) is information
      True
    """
    return rounded(information)


@functools.singledispatch
def rounded(information: Information) -> Information:
    """As it is kept, but for a compensated one, which is rounded to its structure.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> pair = ff.structures.Compensated(
      ...     ff.structures.Diagonal(jnp.array([2.0])),
      ...     ff.structures.Diagonal(jnp.array([0.5])),
      ... )
      >>> print(ff.information.rounded(pair).entries)
      [2.5]
    """
    return information

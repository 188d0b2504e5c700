"""The contract: what can be asked of any information, dispatched on its type."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fisherflow_jax._ground import trees

PyTree = Any
Information = Any


def _unsupported(operation: str, information: Any) -> TypeError:
    return TypeError(
        f"information.{operation} knows no structure of type "
        f"{type(information).__name__}; an information is what an estimator returns "
        "or a state's .information."
    )


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
    raise _unsupported("matvec", information)


@functools.singledispatch
def solver(
    information: Information, damping: jax.typing.ArrayLike = 0.0
) -> Callable[[PyTree], PyTree]:
    """Factorises once and returns the function `v -> (I + damping 1)^-1 v`.

    Dense matrices are factorised by Cholesky after equilibration (a unit diagonal),
    so that parameters of very different scale cost no digits. An operator that is not
    positive definite gives NaN.
    """
    raise _unsupported("solver", information)


def solve(
    information: Information, vector: PyTree, damping: jax.typing.ArrayLike = 0.0
) -> PyTree:
    """The solution `x` of `(I + damping 1) x = v`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([1.0, 3.0]))
      >>> ff.information.solve(information, jnp.array([4.0, 8.0]), damping=1.0)
      Array([2., 2.], dtype=float32)
    """
    return solver(information, damping)(vector)


@functools.singledispatch
def logdet(information: Information, like: PyTree | None = None) -> jax.Array:
    """The log-determinant `log |I|`, a number."""
    raise _unsupported("logdet", information)


@functools.singledispatch
def trace(information: Information, like: PyTree | None = None) -> jax.Array:
    """The trace of `I`, a number."""
    raise _unsupported("trace", information)


@functools.singledispatch
def diagonal(information: Information, like: PyTree | None = None) -> PyTree:
    """The diagonal of `I`, a pytree like the parameters."""
    raise _unsupported("diagonal", information)


@functools.singledispatch
def inverse_diagonal(information: Information, like: PyTree | None = None) -> PyTree:
    """The diagonal of `I^-1`: the variance of each parameter, a pytree like them."""
    raise _unsupported("inverse_diagonal", information)


@functools.singledispatch
def to_dense(information: Information, like: PyTree | None = None) -> jax.Array:
    """The matrix `(d, d)` in the order of `jax.tree.leaves`, each leaf ravelled."""
    raise _unsupported("to_dense", information)


def quadratic_form(information: Information, vector: PyTree) -> jax.Array:
    """The number `v^T I v`."""
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
            f"{type(right).__name__} do not add: neither structure can hold the other."
        )
    return result


@functools.singledispatch
def add_to(left: Information, right: Information) -> Information:
    """`left + right` in the type of `left`, or NotImplemented."""
    raise _unsupported("add", left)


@functools.singledispatch
def scale(information: Information, factor: jax.typing.ArrayLike) -> Information:
    """The information `factor * I`."""
    raise _unsupported("scale", information)


@functools.singledispatch
def total(stacked: Information, weights: jax.Array) -> Information:
    """The sum of `weights[k] * I_k` over a stack with leaves `(k, ...)`."""
    raise _unsupported("total", stacked)


@functools.singledispatch
def fuse(start: Information, parts: Sequence[Information]) -> Information:
    """The sum `I_s + sum_k (I_k - I_s)` of what the parts added to the start."""
    fused = start
    for part in parts:
        fused = add(add(fused, part), scale(start, -1.0))
    return fused


@functools.singledispatch
def inverse(information: Information) -> Information:
    """The inverse `I^-1` in the same structure (scalar, diagonal, block, full)."""
    raise _unsupported("inverse", information)


@functools.singledispatch
def sandwich(information: Information, meat: Information) -> Information:
    """The sandwich `I^-1 M I^-1` of two informations of the same structure."""
    raise _unsupported("sandwich", information)


@functools.singledispatch
def propagate(
    information: Information, noise: Any, transition: Any | None = None
) -> Information:
    """The prediction step `(A I^-1 A^T + Q)^-1` of a Kalman filter.

    `noise` is Q and `transition` is A (None: the identity): each a `Scalar`, a
    `Diagonal`, or a matrix `(d, d)` in ravelled order.
    """
    raise _unsupported("propagate", information)


@functools.singledispatch
def conform(template: Information, information: Information) -> Information:
    """`information` in the representation of `template` (compensated or plain)."""
    return information


@functools.singledispatch
def plain(information: Information) -> Information:
    """The information itself, or the rounded value of a compensated one."""
    return information

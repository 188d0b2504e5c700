"""One number for all parameters: the mean of the information's diagonal."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import choices, trees
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._algebra import linear
from fisherflow_jax.structures._algebra.outer_products import leaf_size, sum_of_squares
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Scalar(NamedTuple):
    """Information `value * identity`. Kept by `ff.structures.scalar`."""

    value: jax.Array  # shape=()


@choices.choice
def scalar() -> Structure:
    r"""Keeps `trace(F) / d`, one number for all `d` parameters.

    Exact when the information is a multiple of the identity (the mean of isotropic
    observations); otherwise the intervals are those of an average parameter.

    Returns:
      A `Structure` whose information is a `Scalar`. Memory O(1), solve O(d).

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.structures.scalar().reduce(jnp.array([[3.0, 4.0]]))
      Scalar(value=Array(12.5, dtype=float32))
    """

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Scalar:
        return Scalar(jnp.asarray(value, trees.float_dtype(params)))

    def from_diagonal(diagonal: PyTree) -> Scalar:
        return Scalar(jnp.mean(trees.ravel(diagonal)))

    return Structure(
        "scalar()",
        _reduce,
        isotropic,
        supports=capabilities.OF_A_MATRIX | {capabilities.MARGINAL},
        from_matvec=lambda matvec, params: from_diagonal(
            linear.diagonal_of(matvec, params)
        ),
        from_full=lambda full: from_diagonal(ops.diagonal(full)),
        takes_outer_products=True,
    )


def _reduce(stack: PyTree) -> Scalar:
    dtype = trees.float_dtype(stack)
    leaves = jax.tree.leaves(stack)
    count = sum(leaf_size(x) for x in leaves)
    squares = (sum_of_squares(x, dtype) for x in leaves)
    return Scalar(sum(squares, start=jnp.zeros((), dtype)) / max(count, 1))


class AllAlike(ops.Parameters):
    """The basis of the parameters, whose shapes are not stored."""

    def diagonal(self, values: jax.Array, like: PyTree | None) -> PyTree:
        if like is None:
            raise ValueError(
                "a scalar information stores no shape: give like=, a tree shaped like "
                "the parameters (a state's mean)."
            )
        return jax.tree.map(lambda x: jnp.full(x.shape, values), like)


def _number_of(information: Scalar, operator: Any, name: str) -> jax.Array:
    if not isinstance(operator, Scalar):
        raise ValueError(
            f"with the scalar structure {name} must be one number, to keep the "
            f"structure; got {type(operator).__name__}."
        )
    return operator.value


linear.register_elementwise(Scalar, linear.refuse, _number_of, AllAlike())
ops.squares.register(Scalar, lambda information, stack: _reduce(stack))


@ops.logdet.register
def _(information: Scalar, like: PyTree | None = None) -> jax.Array:
    return jnp.log(information.value) * _size(information, like)


@ops.trace.register
def _(information: Scalar, like: PyTree | None = None) -> jax.Array:
    return information.value * _size(information, like)


def _size(information: Scalar, like: PyTree | None) -> jax.Array:
    count = trees.size(jax.eval_shape(lambda i: ops.diagonal(i, like), information))
    return jnp.asarray(count, information.value.dtype)


@ops.restrict.register
def _(information: Scalar, shown: PyTree, like: PyTree | None = None) -> Scalar:
    return information

"""One number for all parameters: the mean of the information's diagonal."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.choices import choice
from fisherflow_jax.structures import _structure as structure
from fisherflow_jax.structures._algebra.basis import diagonal_of
from fisherflow_jax.structures._algebra.outer_products import leaf_size, sum_of_squares
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Scalar(NamedTuple):
    """Information `value * identity`."""

    value: jax.Array  # shape=()


@choice
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

    def reduce(stack: PyTree) -> Scalar:
        dtype = trees.float_dtype(stack)
        leaves = jax.tree.leaves(stack)
        count = sum(leaf_size(x) for x in leaves)
        squares = (sum_of_squares(x, dtype) for x in leaves)
        return Scalar(sum(squares, start=jnp.zeros((), dtype)) / max(count, 1))

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Scalar:
        return Scalar(jnp.asarray(value, trees.float_dtype(params)))

    def from_diagonal(diagonal: PyTree) -> Scalar:
        return Scalar(jnp.mean(trees.ravel(diagonal)))

    return Structure(
        "scalar()",
        reduce,
        isotropic,
        supports=frozenset(
            {
                structure.RANDOM_WALK,
                structure.ROBUST,
                structure.MARGINAL,
                structure.COMPENSATED,
                structure.OBSERVED,
            }
        ),
        from_matvec=lambda matvec, params: from_diagonal(diagonal_of(matvec, params)),
        from_full=lambda full: from_diagonal(ops.diagonal(full)),
        takes_outer_products=True,
    )


def _like(like: PyTree | None) -> PyTree:
    if like is None:
        raise ValueError(
            "a scalar information stores no shape: give like=, a tree shaped like "
            "the parameters (a state's mean)."
        )
    return like


def _fill(value: jax.Array, like: PyTree | None) -> PyTree:
    return jax.tree.map(lambda x: jnp.full(x.shape, value, value.dtype), _like(like))


def _size(like: PyTree | None, dtype: Any) -> jax.Array:
    return jnp.asarray(trees.size(_like(like)), dtype)


@ops.matvec.register
def _(information: Scalar, vector: PyTree) -> PyTree:
    value = information.value
    return jax.tree.map(lambda x: value * x.astype(value.dtype), vector)


@ops.solver.register
def _(information: Scalar, damping: jax.typing.ArrayLike = 0.0):
    value = information.value + damping
    return lambda v: jax.tree.map(lambda x: x.astype(value.dtype) / value, v)


@ops.facts.register
def _(information: Scalar) -> ops.Facts:
    return ops.Facts(elementwise=True)


@ops.spectral.register
def _(information: Scalar, like: PyTree | None = None) -> ops.Spectral:
    return ops.Spectral(information.value, ops.Parameters())


@ops.restrict.register
def _(information: Scalar, shown: PyTree, like: PyTree | None = None) -> Scalar:
    return information


@ops.logdet.register
def _(information: Scalar, like: PyTree | None = None) -> jax.Array:
    value = information.value
    return _size(like, value.dtype) * jnp.log(value)


@ops.trace.register
def _(information: Scalar, like: PyTree | None = None) -> jax.Array:
    return _size(like, information.value.dtype) * information.value


@ops.diagonal.register
def _(information: Scalar, like: PyTree | None = None) -> PyTree:
    return _fill(information.value, like)


@ops.inverse_diagonal.register
def _(information: Scalar, like: PyTree | None = None) -> PyTree:
    return _fill(1 / information.value, like)


@ops.to_dense.register
def _(information: Scalar, like: PyTree | None = None) -> jax.Array:
    value = information.value
    return value * jnp.eye(trees.size(_like(like)), dtype=value.dtype)


@ops.add_to.register
def _(left: Scalar, right: Any) -> Any:
    if isinstance(right, Scalar):
        return Scalar(left.value + right.value)
    return NotImplemented


@ops.scale.register
def _(information: Scalar, factor: jax.typing.ArrayLike) -> Scalar:
    return Scalar(information.value * factor)


@ops.total.register
def _(stacked: Scalar, weights: jax.Array) -> Scalar:
    return Scalar(jnp.tensordot(weights, stacked.value, 1))


@ops.inverse.register
def _(information: Scalar) -> Scalar:
    return Scalar(1 / information.value)


@ops.sandwich.register
def _(information: Scalar, meat: Scalar) -> Scalar:
    return Scalar(meat.value / jnp.square(information.value))


@ops.propagate.register
def _(information: Scalar, noise: Any, transition: Any | None = None) -> Scalar:
    for name, operator in (("process_noise", noise), ("transition", transition)):
        if operator is not None and not isinstance(operator, Scalar):
            raise ValueError(
                f"with the scalar structure {name} must be one number, to keep the "
                f"structure; got {type(operator).__name__}."
            )
    gain = information.value
    if transition is not None:
        # a zero transition forgets everything: the predicted variance is the noise
        factor = jnp.square(transition.value)
        return Scalar(gain / (factor + noise.value * gain))
    return Scalar(gain / (1 + noise.value * gain))

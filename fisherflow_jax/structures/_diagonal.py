"""One number a parameter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.choices import choice
from fisherflow_jax._ground.holes import punch
from fisherflow_jax.layers import Layers
from fisherflow_jax.structures import _structure as structure
from fisherflow_jax.structures._algebra.basis import diagonal_of
from fisherflow_jax.structures._algebra.outer_products import squares
from fisherflow_jax.structures._scalar import Scalar
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Diagonal(NamedTuple):
    """Information that is diagonal."""

    entries: PyTree  # like the parameters


@choice
def diagonal(layers: Layers | None = None) -> Structure:
    r"""Keeps the diagonal of the information, one number a parameter.

    Exact when the information is diagonal. Under correlation the diagonal of a sum is
    not the precision of an estimate: one-pass estimates are inefficient and their
    intervals too narrow, whatever the step (`marginal=True` in `ff.fisher_flow` is
    the cure).

    Args:
      layers: None; or what `ff.layers.find_layers(..., batched=True)` found, for a
        model whose examples interact: estimators then pass it whole batches.

    Returns:
      A `Structure` whose information is a `Diagonal`. Memory d, solve O(d).

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> stack = jnp.array([[1.0, 2.0], [3.0, 4.0]])  # two vectors
      >>> ff.structures.diagonal().reduce(stack)
      Diagonal(entries=Array([10., 20.], dtype=float32))
    """

    def reduce(stack: PyTree) -> Diagonal:
        dtype = trees.float_dtype(stack)
        return Diagonal(jax.tree.map(lambda x: squares(x, dtype), stack))

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Diagonal:
        dtype = trees.float_dtype(params)
        # laid out over devices as the parameters are
        return Diagonal(jax.tree.map(lambda x: jnp.full_like(x, value, dtype), params))

    return Structure(
        "diagonal()",
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
        from_matvec=lambda matvec, params: Diagonal(diagonal_of(matvec, params)),
        from_full=lambda full: Diagonal(ops.diagonal(full)),
        takes_outer_products=True,
        layers=layers,
    )


def _map(function: Any, information: Diagonal, *rest: PyTree) -> Diagonal:
    return Diagonal(jax.tree.map(function, information.entries, *rest))


@ops.matvec.register
def _(information: Diagonal, vector: PyTree) -> PyTree:
    return _map(lambda a, x: a * x.astype(a.dtype), information, vector).entries


@ops.solver.register
def _(information: Diagonal, damping: jax.typing.ArrayLike = 0.0):
    damped = _map(lambda a: a + damping, information)
    return lambda v: _map(lambda a, x: x.astype(a.dtype) / a, damped, v).entries


@ops.facts.register
def _(information: Diagonal) -> ops.Facts:
    return ops.Facts(elementwise=True)


@ops.spectral.register
def _(information: Diagonal, like: PyTree | None = None) -> ops.Spectral:
    return ops.Spectral(information.entries, ops.Parameters())


@ops.restrict.register
def _(information: Diagonal, shown: PyTree, like: PyTree | None = None) -> Diagonal:
    return Diagonal(punch(information.entries, shown))


@ops.logdet.register
def _(information: Diagonal, like: PyTree | None = None) -> jax.Array:
    return jnp.sum(jnp.log(trees.ravel(information.entries)))


@ops.trace.register
def _(information: Diagonal, like: PyTree | None = None) -> jax.Array:
    return jnp.sum(trees.ravel(information.entries))


@ops.diagonal.register
def _(information: Diagonal, like: PyTree | None = None) -> PyTree:
    return information.entries


@ops.inverse_diagonal.register
def _(information: Diagonal, like: PyTree | None = None) -> PyTree:
    return _map(lambda a: 1 / a, information).entries


@ops.to_dense.register
def _(information: Diagonal, like: PyTree | None = None) -> jax.Array:
    return jnp.diag(trees.ravel(information.entries))


@ops.add_to.register
def _(left: Diagonal, right: Any) -> Any:
    if isinstance(right, Diagonal):
        return _map(jnp.add, left, right.entries)
    if isinstance(right, Scalar):
        return _map(lambda a: a + right.value.astype(a.dtype), left)
    return NotImplemented


@ops.scale.register
def _(information: Diagonal, factor: jax.typing.ArrayLike) -> Diagonal:
    return _map(lambda a: a * factor, information)


@ops.total.register
def _(stacked: Diagonal, weights: jax.Array) -> Diagonal:
    return _map(lambda a: jnp.tensordot(weights, a, 1), stacked)


@ops.inverse.register
def _(information: Diagonal) -> Diagonal:
    return _map(lambda a: 1 / a, information)


@ops.sandwich.register
def _(information: Diagonal, meat: Diagonal) -> Diagonal:
    return _map(lambda a, m: m / jnp.square(a), information, meat.entries)


@ops.propagate.register
def _(information: Diagonal, noise: Any, transition: Any | None = None) -> Diagonal:
    for name, operator in (("process_noise", noise), ("transition", transition)):
        if not isinstance(operator, (Scalar, Diagonal, type(None))):
            raise ValueError(
                f"with the diagonal structure {name} must be a number or a pytree "
                "prefix of the parameters, to keep the structure; got a matrix."
            )
    like = information.entries
    variances = ops.diagonal(noise, like)
    if transition is None:
        return _map(lambda a, q: a / (1 + q * a), information, variances)
    factors = ops.diagonal(transition, like)
    return _map(
        lambda a, q, f: a / (jnp.square(f) + q * a), information, variances, factors
    )

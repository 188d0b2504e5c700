"""One number a parameter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import choices, trees
from fisherflow_jax.layers import Layers
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._algebra import linear
from fisherflow_jax.structures._algebra.outer_products import squares
from fisherflow_jax.structures._scalar import Scalar
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Diagonal(NamedTuple):
    """Information that is diagonal. Kept by `ff.structures.diagonal`."""

    entries: PyTree  # like the parameters


@choices.choice
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

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Diagonal:
        dtype = trees.float_dtype(params)
        # laid out over devices as the parameters are
        return Diagonal(jax.tree.map(lambda x: jnp.full_like(x, value, dtype), params))

    return Structure(
        "diagonal()",
        _reduce,
        isotropic,
        supports=capabilities.OF_A_MATRIX | {capabilities.MARGINAL},
        from_matvec=lambda matvec, params: Diagonal(linear.diagonal_of(matvec, params)),
        from_full=lambda full: Diagonal(ops.diagonal(full)),
        takes_outer_products=True,
        layers=layers,
    )


def _reduce(stack: PyTree) -> Diagonal:
    dtype = trees.float_dtype(stack)
    return Diagonal(jax.tree.map(lambda x: squares(x, dtype), stack))


def _add_other(left: Diagonal, right: Any) -> Any:
    if isinstance(right, Scalar):
        return Diagonal(
            jax.tree.map(lambda a: a + right.value.astype(a.dtype), left.entries)
        )
    return NotImplemented


def _entries_of(information: Diagonal, operator: Any, name: str) -> PyTree:
    if not isinstance(operator, (Scalar, Diagonal)):
        raise ValueError(
            f"with the diagonal structure {name} must be a number or a pytree "
            "prefix of the parameters, to keep the structure; got a matrix."
        )
    return ops.diagonal(operator, information.entries)


linear.register_elementwise(Diagonal, _add_other, _entries_of, ops.Parameters())
ops.squares.register(Diagonal, lambda information, stack: _reduce(stack))


@ops.to_dense.register
def _(information: Diagonal, like: PyTree | None = None) -> jax.Array:
    return jnp.diag(trees.ravel(information.entries))


@ops.restrict.register
def _(information: Diagonal, shown: PyTree, like: PyTree | None = None) -> Diagonal:
    return Diagonal(trees.punch(information.entries, shown))


@ops.embed.register
def _(
    information: Diagonal,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> Diagonal:
    fresh = optax.tree.cast(entries, trees.float_dtype(information.entries))
    return Diagonal(trees.laid_over(information.entries, fresh))


@ops.embed.register
def _(
    information: Scalar,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> Diagonal:
    return ops.embed(Diagonal(ops.diagonal(information, like)), entries)

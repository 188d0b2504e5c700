"""Informations whose arrays add, and what is read of an operator by its products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures._algebra import columns

PyTree = Any


def scaled(information: Any, factor: jax.typing.ArrayLike) -> Any:
    """Every array times a number."""
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), information)


def total(stacked: Any, weights: jax.Array) -> Any:
    """The weighted sum of every array over its first axis."""
    return jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), stacked)


def refuse(left: Any, right: Any) -> Any:
    return NotImplemented


def check_same(left: Any, right: Any, kind: type) -> None:
    """Raises where two informations of a type are kept differently."""
    structures: list[Any] = [jax.tree.structure(x) for x in (left, right)]
    if structures[0] != structures[1]:
        raise TypeError(
            f"two {kind.__name__} informations add only when their partitions agree, "
            "or their layers, and these differ: measure both with one structure."
        )


def register(kind: type, add_other: Callable[[Any, Any], Any] = refuse) -> None:
    """Gives a type `add_to`, `scale` and `total`; `add_other` adds other types."""

    def add_to(left: Any, right: Any) -> Any:
        if type(right) is not type(left):
            return add_other(left, right)
        check_same(left, right, kind)
        return jax.tree.map(jnp.add, left, right)

    ops.add_to.register(kind, add_to)
    ops.scale.register(kind, scaled)
    ops.total.register(kind, total)


def register_elementwise(
    kind: type,
    add_other: Callable[[Any, Any], Any],
    numbers_of: Callable[[Any, Any, str], PyTree],
    basis: Any,
) -> None:
    """Gives a type, whose one field has the entries' factors, all its operations.

    `numbers_of(information, operator, name)` are those of a noise or a transition.
    """

    def mapped(function: Callable, information: Any, *rest: PyTree) -> Any:
        return kind(jax.tree.map(function, information[0], *rest))

    def propagate(information: Any, noise: Any, transition: Any | None = None) -> Any:
        variances = numbers_of(information, noise, "process_noise")
        if transition is None:
            return mapped(lambda a, q: a / (1 + q * a), information, variances)
        # a zero transition forgets everything: the predicted variance is the noise
        return mapped(
            lambda a, q, f: a / (jnp.square(f) + q * a),
            information,
            variances,
            numbers_of(information, transition, "transition"),
        )

    register(kind, add_other)
    ops.by_columns.register(kind, columns.each_by_itself)
    ops.facts.register(kind, lambda information: ops.Facts(elementwise=True))
    ops.spectral.register(kind, lambda i, like=None: ops.Spectral(i[0], basis))
    ops.inverse.register(kind, lambda i: mapped(lambda a: 1 / a, i))
    ops.sandwich.register(
        kind, lambda i, meat: mapped(lambda a, m: m / jnp.square(a), i, meat[0])
    )
    ops.propagate.register(kind, propagate)


# ---- reading an operator by multiplying unit vectors


def map_basis(
    matvec: Callable[[PyTree], PyTree],
    params: PyTree,
    read: Callable[[jax.Array, jax.Array], Any],
    *,
    indices: np.ndarray | None = None,
    batch_size: int = 16,
) -> Any:
    """`read(M e_i, k)` stacked over the k-th of `indices` i (None: all of them).

    One product an index, `batch_size` of them at a time. `M e_i` reaches `read`
    ravelled, shape `(d,)`.
    """
    count, dtype = trees.size(params), trees.float_dtype(params)
    indices = np.arange(count) if indices is None else indices
    positions = jnp.arange(len(indices), dtype=jnp.int32)

    def one(position: jax.Array) -> Any:
        index = jnp.asarray(indices, jnp.int32)[position]
        unit = jnp.zeros((count,), dtype).at[index].set(1.0)
        tree = trees.unravel(unit, params)
        cast = jax.tree.map(lambda x, like: x.astype(like.dtype), tree, params)
        return read(trees.ravel(matvec(cast)), position)

    return jax.lax.map(one, positions, batch_size=batch_size)


def diagonal_of(matvec: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """The diagonal of the operator, a pytree like `params`."""
    flat = map_basis(matvec, params, lambda column, index: column[index])
    return trees.unravel(flat, params)

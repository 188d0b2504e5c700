"""Reading entries of a symmetric operator by multiplying unit vectors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import trees

PyTree = Any


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

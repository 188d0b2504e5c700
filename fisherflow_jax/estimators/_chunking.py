"""Sums over a batch, a part of it at a time, and a key for each example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.chunks import sum_chunks as sum_chunks
from fisherflow_jax.structures import Structure

PyTree = Any

# Pulled-back vectors held at once when no chunk_size is given: 64 MiB in float32.
CHUNK_ENTRIES = 2**24
# Of groups, whose passes are large enough to run one after the other: 4 MiB, a cache.
GROUP_ENTRIES = 2**20


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            f"chunk_size is a positive whole number of examples; got {chunk_size!r}."
        )


def example_keys(key: jax.Array | None, count: int) -> jax.Array | None:
    """A key for each example, so that neither chunks nor groups change a draw."""
    if key is None:
        return None
    indices = jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def default_size(entries: int, bound: int) -> int:
    """How many units of so many entries each are held at once."""
    return max(bound // max(entries, 1), 1)


def sum_informations(
    part: Callable[[Batch, jax.Array | None], Any],
    structure: Structure,
    params: PyTree,
    batch: Batch,
    keys: jax.Array | None,
    size: int,
) -> Any:
    """`sum_chunks` of informations in `structure`."""
    return sum_chunks(
        part, ops.add, lambda: structure.isotropic(params, 0.0), batch, keys, size
    )


def zeros_like_sum(part: Callable, batch: Batch, keys: jax.Array | None) -> PyTree:
    """Zeros of the shapes and types of `part(batch, keys)`."""
    shapes = jax.eval_shape(part, batch, keys)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def num_entries(pull: Callable, batch: Batch, keys: jax.Array | None) -> int:
    """The entries that pulling back the whole batch makes."""
    return trees.size(jax.eval_shape(pull, batch, keys))

"""Sums over a batch, a part of it at a time, and a key for each example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.chunks import cut
from fisherflow_jax.structures import Structure

PyTree = Any

# Pulled-back vectors held at once when no chunk_size is given: 64 MiB in float32.
CHUNK_ENTRIES = 2**24
# Of groups, whose passes are large enough to run one after the other: 4 MiB, a cache.
GROUP_ENTRIES = 2**20
# So few chunks are written out: XLA runs convolutions slowly inside a loop on CPU.
_WRITTEN_OUT = 4


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


def sum_chunks(
    part: Callable[[Batch, jax.Array | None], Any],
    add: Callable[[Any, Any], Any],
    zero: Callable[[], Any],
    batch: Batch,
    keys: jax.Array | None,
    size: int,
) -> Any:
    """The sum of `part(chunk, keys)` over chunks of at most `size` units.

    A unit is an index of the batch's leading axis: an example, or a group of them.
    """
    count = batches.num_examples(batch)
    if count <= size:
        return part(batch, keys)
    chunks, number = cut(batch, size)
    sliced, rebuild = batches.split(chunks.inputs)
    if keys is not None:
        length = chunks.weights.shape[1]
        index = jnp.minimum(jnp.arange(number * length, dtype=jnp.int32), count - 1)
        keys = keys[index].reshape((number, length, *keys.shape[1:]))

    def body(total: Any, chunk: Any) -> tuple[Any, None]:
        leaves, targets, weights, chunk_keys = chunk
        examples = Batch(rebuild(leaves), targets, weights)
        return add(total, part(examples, chunk_keys)), None

    parts = sliced, chunks.targets, chunks.weights, keys
    return jax.lax.scan(body, zero(), parts, unroll=number <= _WRITTEN_OUT)[0]


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

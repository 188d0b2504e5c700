"""Leading axes taken a part at a time: results side by side, or sums over a batch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground.batch import Batch, map_examples, num_examples, unpack

PyTree = Any

# So few chunks are written out: XLA runs convolutions slowly inside a loop on CPU.
_WRITTEN_OUT = 4


def map_chunks(function: Callable, stack: PyTree, size: int) -> PyTree:
    """`function(stack)`, given at most `size` of the leading axis at a time.

    The last chunk is filled up with the last entry, so that one program serves all.
    """
    count = jax.tree.leaves(stack)[0].shape[0]
    cut, number, length = _cutter(count, size)
    if number == 1:
        return function(stack)
    chunks = jax.lax.map(function, jax.tree.map(cut, stack))
    return jax.tree.map(
        lambda x: x.reshape((number * length, *x.shape[2:]))[:count], chunks
    )


def map_slices(function: Callable, stack: PyTree, size: int) -> PyTree:
    """As `map_chunks`, read and written where the arrays lie: none of them is copied.

    The last slice reaches back over rows of the one before it.
    """
    count = jax.tree.leaves(stack)[0].shape[0]
    if count <= size:
        return function(stack)
    number = math.ceil(count / size)
    length = math.ceil(count / number)
    starts = np.minimum(np.arange(number, dtype=np.int32) * length, count - length)

    def at(start: jax.Array) -> PyTree:
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, length)

        return function(jax.tree.map(cut, stack))

    def write(found: PyTree, start: jax.Array) -> tuple[PyTree, None]:
        def put(x: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)

        return jax.tree.map(put, found, at(start)), None

    shapes = jax.eval_shape(at, starts[0])
    whole = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), shapes)
    return jax.lax.scan(write, whole, starts)[0]


def sum_chunks(
    part: Callable[[Batch, jax.Array | None], Any],
    add: Callable[[Any, Any], Any],
    zero: Callable[[], Any],
    batch: Batch,
    keys: jax.Array | None,
    size: int,
) -> Any:
    """The sum of `part(chunk, keys)` over chunks of at most `size` units.

    A unit is an index of the batch's leading axis: an example, or a group of them. The
    last chunk is filled up with units of weight zero.
    """
    count = num_examples(batch)
    if count <= size:
        return part(batch, keys)
    chunks, number = cut(batch, size)
    parts, rebuild = unpack(chunks)

    def body(total: Any, chunk: Any) -> tuple[Any, None]:
        *examples, chunk_keys = chunk
        return add(total, part(rebuild(*examples), chunk_keys)), None

    keys = jax.tree.map(_cutter(count, size)[0], keys)
    unroll = number <= _WRITTEN_OUT
    return jax.lax.scan(body, zero(), (*parts, keys), unroll=unroll)[0]


def cut(batch: Batch, size: int) -> tuple[Batch, int]:
    """The batch as `(m, c, ...)` with c <= size, padded by rows of weight zero."""
    stack, number, _ = _cutter(num_examples(batch), size)
    weights = _cutter(num_examples(batch), size, zeros=True)[0](batch.weights)
    return map_examples(stack, batch)._replace(weights=weights), number


def _cutter(count: int, size: int, zeros: bool = False) -> tuple[Callable, int, int]:
    """What brings `(count, ...)` to `(m, c, ...)` with c <= size, and m and c.

    The end is filled up with the last entry, or with zeros.
    """
    number = math.ceil(count / size)
    length = math.ceil(count / number)
    padding = number * length - count

    def stack(x: jax.Array) -> jax.Array:
        if padding:
            last = jnp.zeros_like(x[-1:]) if zeros else x[-1:]
            x = jnp.concatenate([x, jnp.broadcast_to(last, (padding, *x.shape[1:]))])
        return x.reshape((number, length, *x.shape[1:]))

    return stack, number, length

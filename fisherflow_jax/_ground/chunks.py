"""A batch cut into parts of one size."""

import math

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.batch import Batch, map_examples, num_examples


def cut(batch: Batch, size: int) -> tuple[Batch, int]:
    """The batch as `(m, c, ...)` with c <= size, padded by rows of weight zero."""
    count = num_examples(batch)
    number = math.ceil(count / size)
    length = math.ceil(count / number)
    padding = number * length - count

    def stack(x: jax.Array) -> jax.Array:
        if padding:
            rest = jnp.broadcast_to(x[:1], (padding, *x.shape[1:]))
            x = jnp.concatenate([x, rest])
        return x.reshape((number, length, *x.shape[1:]))

    stacked = map_examples(stack, batch)
    weights = batch.weights
    if padding:
        rest = jnp.zeros((padding, *weights.shape[1:]), weights.dtype)
        weights = jnp.concatenate([weights, rest])
    weights = weights.reshape((number, length, *weights.shape[1:]))
    return stacked._replace(weights=weights), number

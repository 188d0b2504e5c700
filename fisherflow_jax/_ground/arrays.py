"""Arrays of a floating type wide enough to compute with."""

from typing import Any

import jax
import jax.numpy as jnp


def widen(values: Any) -> jax.Array:
    """The values as an array of a floating type of at least 32 bits.

    Of a likelihood whose outputs are the mean on an unbounded scale, the `line`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.likelihoods.widen(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(jnp.result_type(float))
    if jnp.finfo(values.dtype).bits < 32:
        return values.astype(jnp.float32)
    return values


def like(values: Any, reference: jax.Array) -> jax.Array:
    """The values, a number or an array of any type, in the dtype of the reference."""
    return jnp.asarray(values).astype(reference.dtype)


def safe_sqrt(values: jax.Array) -> jax.Array:
    """The square root, with derivative zero where the value is zero."""
    some = values != 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, values, 1)), 0)

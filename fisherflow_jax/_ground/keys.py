"""Keys: an int, a typed key or key data, as what is stored or drawn from."""

from typing import Any

import jax
import jax.numpy as jnp


def key_data(key: Any) -> jax.Array | None:
    """A key given as int, typed key or key data, as key data (uint32)."""
    if key is None:
        return None
    key = jnp.asarray(key)
    if key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):  # a seed
        key = jax.random.key(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(key)
    if key.dtype != jnp.uint32:
        raise ValueError(
            "key must be an int, a key of jax.random.key, or its uint32 key data; "
            f"got an array of {key.dtype}."
        )
    return key


def typed_key(key: Any) -> jax.Array:
    """A key given as int, typed key or key data, as a typed key."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    data = key_data(key)
    if data is None:
        raise ValueError("a key is needed: an int, or a key of jax.random.key.")
    # key data does not say its generator, but the generators' sizes differ
    return jax.random.wrap_key_data(
        data, impl="threefry2x32" if data.shape[-1] == 2 else "rbg"
    )

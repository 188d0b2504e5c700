"""Distributions of random probes: mean zero, unit variance, uncorrelated entries.

A probe is a function `(key, shape, dtype) -> array`, given to an estimator as `probe=`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

_WORD = 32


def rademacher(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32):
    """Signs -1 and 1 with equal probability, one random bit each.

    The distribution with the least fourth moment: an estimator's variance is
    :math:`2 F^2 - 2 \\sum a^4`, against :math:`2 F^2` with Gaussian probes. Bits are
    unpacked from 32-bit words, a thirty-second of the random numbers.

    Example:
      >>> import jax
      >>> import fisherflow_jax as ff
      >>> signs = ff.estimators.rademacher(jax.random.key(0), (2, 40))
      >>> signs.shape, sorted(set(signs.ravel().tolist()))
      ((2, 40), [-1.0, 1.0])
    """
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // _WORD),), jnp.uint32)
    places = jnp.arange(_WORD, dtype=jnp.uint32)
    bits = (words[:, None] >> places[None, :]) & jnp.uint32(1)
    signs = 1 - 2 * bits.reshape(-1)[:count].astype(jnp.int32)
    return signs.astype(dtype).reshape(shape)


def gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32):
    """Draws of the standard normal distribution.

    Example:
      >>> import jax
      >>> import fisherflow_jax as ff
      >>> ff.estimators.gaussian(jax.random.key(0), (2, 3)).shape
      (2, 3)
    """
    return jax.random.normal(key, shape, dtype)

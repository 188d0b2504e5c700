"""Logarithms of gamma and beta functions that do not cancel for large arguments."""

import math

import jax
import jax.numpy as jnp

# From here on the series below is exact to float64.
_SERIES_FROM = 16


def stirling_remainder(x: jax.Array | float) -> jax.Array:
    """x log x - x - log Gamma(x) for x > 0, without the cancellation of its terms."""
    small = jnp.minimum(x, _SERIES_FROM)
    direct = small * jnp.log(small) - small - jax.scipy.special.gammaln(small)
    inverse = 1 / jnp.maximum(x, _SERIES_FROM)
    square = inverse**2
    tail = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    series = -0.5 * jnp.log(2 * math.pi * inverse) - tail
    return jnp.where(x < _SERIES_FROM, direct, series)


def log_beta(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """log B(a, b) for a, b > 0; `jax.scipy.special.betaln` has float32 accuracy."""
    terms = a * jnp.log1p(b / a) + b * jnp.log1p(a / b)
    # written once for all three: log Gamma is a long program
    each = stirling_remainder(jnp.stack(jnp.broadcast_arrays(a + b, a, b)))
    return each[0] - (each[1] + each[2]) - terms

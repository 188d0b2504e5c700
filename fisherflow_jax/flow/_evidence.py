"""What a batch adds to the log-evidence."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln


class Fitted(NamedTuple):
    """A belief about parameters and dispersion, each `()`."""

    residual: Any
    weight: jax.Array  # of the observations
    logdet: jax.Array


def known_dispersion(
    log_likelihood: jax.Array,
    distance: jax.Array,
    logdet_before: jax.Array,
    logdet_after: jax.Array,
) -> jax.Array:
    """Laplace's integral of the batch's likelihood over the belief before it.

    Exact when linear-Gaussian. `distance` is `|theta - theta^-|^2` by the information
    before the batch.
    """
    return log_likelihood - 0.5 * distance + 0.5 * (logdet_before - logdet_after)


def bound(
    expected: jax.Array,
    distance: jax.Array,
    logdet_before: jax.Array,
    logdet_after: jax.Array,
    effective: jax.Array,
) -> jax.Array:
    r"""A lower bound of that integral, from the Gaussian q after the batch.

    .. math:: \mathrm E_q \log p(y | \theta) - \mathrm{KL}(q \| p), \qquad
       2\, \mathrm{KL} = |\theta - \theta^-|^2 + \log |I| - \log |I^-|
       - (d - \mathrm{tr}(I^- I^{-1})),

    the last being how many parameters are `effective`. It is reached where q is the
    posterior.
    """
    laplace = known_dispersion(expected, distance, logdet_before, logdet_after)
    return laplace + 0.5 * effective


def unknown_dispersion(
    before: Fitted, after: Fitted, log_unit_variance: jax.Array
) -> jax.Array:
    """The same with the dispersion integrated out under the prior `1 / dispersion`.

    Exact when linear-Gaussian, up to the constant that an improper prior leaves open
    (the evidence of no data is set to one). Elsewhere the likelihood is replaced by the
    quasi-likelihood with the same variance function.
    """
    gain = _integrated(after.residual, after.weight)
    gain = gain - _integrated(before.residual, before.weight)
    return gain - 0.5 * log_unit_variance + 0.5 * (before.logdet - after.logdet)


def _integrated(residual: jax.Array, count: jax.Array) -> jax.Array:
    seen = (count > 0) & (residual > 0)
    safe_residual = jnp.where(seen, residual, jnp.ones_like(residual))
    half = jnp.where(seen, count, jnp.ones_like(count)) / 2
    value = gammaln(half) - half * jnp.log(math.pi * safe_residual)
    return jnp.where(seen, value, jnp.zeros_like(value))

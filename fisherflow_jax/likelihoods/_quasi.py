"""Quasi-likelihoods: a family's mean and variance function, times a dispersion."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fisherflow_jax._ground import checks
from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax.likelihoods import _likelihood as shared
from fisherflow_jax.likelihoods._likelihood import Likelihood


def is_one(dispersion: ArrayLike | None) -> bool:
    """Whether it is known to be one: the likelihood is the family itself."""
    at_hand = dispersion is not None and checks.is_concrete(dispersion)
    return at_hand and bool(np.all(np.asarray(dispersion) == 1))


def with_dispersion(
    family: Likelihood,
    dispersion: ArrayLike | None,
    again: Callable[[ArrayLike], Likelihood],
    saturated: Callable[[jax.Array], jax.Array],
    pearson: Callable[[jax.Array, jax.Array], jax.Array],
    sample: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> Likelihood:
    r"""The family with its variance multiplied by a dispersion :math:`\phi`.

    Its score is the family's over :math:`\phi`; its log-probability Efron's double
    exponential family,

    .. math:: \frac{\log p(y | z) - \log p(y | y)}{\phi} + \log p(y | y)
       - \tfrac12 \log \phi,

    normalised up to terms that vanish for large means, and the family's own at 1.

    Args:
      family: of dispersion one.
      dispersion: a number; None: unknown.
      again: `dispersion ->` the result for it.
      saturated: `targets -> log p(y | y)`, the most that outputs can make of it.
      pearson: `(outputs, targets) ->` :math:`(y - \mu)^2 / V(\mu)`.
      sample: `(key, outputs, variance) -> targets` of that mean and variance.
    """
    if dispersion is None:

        def log_unit_variance(targets: ArrayLike) -> jax.Array:
            # V(y) of the normal density of the height p(y | y)
            values = -2 * saturated(widen(targets)) - math.log(2 * math.pi)
            return shared.nan_outside(family.support(targets), values)

        return family._replace(
            with_dispersion=again,
            pearson=shared.on_both(family.name, pearson),
            log_unit_variance=log_unit_variance,
        )
    shared.require_positive(family.name, "dispersion", dispersion)

    def log_prob(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        value = family.log_prob(outputs, targets)
        phi, most = like(dispersion, value), saturated(like(targets, value))
        return (value - most) / phi + most - 0.5 * jnp.log(phi)

    def variance(outputs: ArrayLike) -> jax.Array:
        value = family.variance(outputs)
        return like(dispersion, value) * value

    def root(outputs: ArrayLike, probes: ArrayLike, key=None) -> jax.Array:
        factor = jax.lax.rsqrt(like(dispersion, widen(outputs)))
        return family.root(outputs, factor * like(probes, factor), key)

    def divided(function: Any, power: float) -> Callable:
        def by_dispersion(outputs: ArrayLike, other: ArrayLike) -> jax.Array:
            value = function(outputs, other)
            return value / like(dispersion, value) ** power

        return by_dispersion

    return family._replace(
        log_prob=log_prob,
        variance=variance,
        sample=lambda key, z: sample(key, widen(z), variance(z)),
        root=root,
        expected_log_prob=None,
        kl=divided(family.kl, 1.0),
        distance=divided(family.distance, 0.5),
    )


def gamma_draws(key: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Positive numbers of a mean and a variance."""
    scale = variance / mean
    return scale * jax.random.gamma(key, mean / scale, mean.shape, mean.dtype)


def beta_draws(key: jax.Array, mean: jax.Array, ratio: jax.Array) -> jax.Array:
    """Shares of variance `ratio mean (1 - mean)`; NaN for a ratio of one and above."""
    size = 1 / jnp.where(ratio < 1, ratio, jnp.nan) - 1
    return jax.random.beta(key, mean * size, (1 - mean) * size, dtype=mean.dtype)

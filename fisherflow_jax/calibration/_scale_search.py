"""The search for the scale of a covariance, on the outputs' moments alone."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.quadrature import normal_log_density
from fisherflow_jax._ground.search import Minimum, minimise
from fisherflow_jax.calibration import _densities as densities
from fisherflow_jax.calibration._held_out import HeldOut
from fisherflow_jax.likelihoods import Likelihood

# The search reaches this many powers of e to both sides of where the outputs' variance
# equals what the likelihood resolves, or (logits, logs) one.
_REACH = 20.0
_DISPERSION_REACH = 12.0


class Found(NamedTuple):
    """What the search found; losses are mean negative log-likelihoods, each `()`."""

    scale: jax.Array
    dispersion: jax.Array | None
    before: jax.Array
    after: jax.Array
    mean_only: jax.Array
    boundary: jax.Array


def _range(held: HeldOut, likelihood: Likelihood | None) -> tuple:
    """Log-scales at which all variances are negligible, and most are overwhelming.

    The unit is one for logits, and for other outputs what the likelihood resolves;
    without a likelihood it is one.
    """
    variance = held.outputs.variance
    if likelihood is not None and likelihood.diagonal and not likelihood.is_classes:
        mean = held.outputs.mean
        factor = likelihood.root(mean, jnp.ones(likelihood.probe_shape(mean.shape)))
        variance = variance * jnp.square(factor.astype(variance.dtype))
    positive = variance > 0
    log = jnp.log(jnp.where(positive, variance, 1.0).astype(variance.dtype))
    rows = (held.weights > 0).reshape((-1,) + (1,) * (variance.ndim - 1))
    middle = -held.mean(log)
    # the largest, not the typical: at the low end the mean alone must be what is left
    least = -jnp.max(jnp.where(positive & rows, log, -middle))
    return jnp.minimum(middle, least) - _REACH, middle + _REACH


def _chosen(
    found: Minimum,
    low: jax.Array,
    high: jax.Array,
    start: jax.Array,
    at_start: jax.Array,
    before: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Point, loss, boundary, and whether what was given is better than all of them.

    An end of the range that is as good as the best is preferred to it, and `start`
    where both ends are: nothing is then known of the scale.
    """
    eps = float(jnp.finfo(found.value.dtype).eps)
    # what rounding can hide, of a mean and of logarithms over the range that cancel
    bound = found.value + 8 * eps * (_REACH + jnp.abs(found.value))
    at_low, at_high = found.at_low <= bound, found.at_high <= bound
    flat = at_low & at_high & (at_start <= bound)
    point = jnp.where(at_high, high, found.point)
    value = jnp.where(at_high, found.at_high, found.value)
    point = jnp.where(at_low, low, point)
    value = jnp.where(at_low, found.at_low, value)
    point = jnp.where(flat, start, point)
    value = jnp.where(flat, at_start, value)
    boundary = jnp.where(at_low, -1, jnp.where(at_high, 1, 0))
    boundary = jnp.where(flat, 0, boundary).astype(jnp.int32)
    keep = (before <= value) | jnp.isnan(value)
    return point, jnp.where(keep, before, value), boundary, keep


@functools.partial(jax.jit, static_argnums=(1, 2))
def alone(held: HeldOut, likelihood: Likelihood, value: Callable) -> Found:
    def loss(log_scale: jax.Array) -> jax.Array:
        outputs = densities.scaled(held.outputs, jnp.exp(log_scale))
        return -held.mean(value(likelihood, outputs, held.targets))

    low, high = _range(held, likelihood)
    zero = jnp.zeros_like(low)
    found = minimise(loss, low, high, zero[None])
    before = found.elsewhere[0]
    point, after, boundary, keep = _chosen(found, low, high, zero, before, before)
    mean_only = -held.mean(likelihood.log_prob(held.outputs.mean, held.targets))
    scale = jnp.exp(jnp.where(keep, zero, point))
    return Found(scale, None, before, after, mean_only, boundary)


@functools.partial(jax.jit, static_argnums=1)
def with_noise(held: HeldOut, likelihood: Likelihood, start: jax.Array) -> Found:
    """By the ratio of both variances; given that, the noise has a closed form."""
    outputs, dtype = held.outputs, held.outputs.variance.dtype
    residual, variance = held.targets.astype(dtype) - outputs.mean, outputs.variance
    square = jnp.square(residual)
    given = likelihood.variance(outputs.mean).ravel()[0] * start.astype(dtype)

    def profile(ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
        relative = ratio * variance + 1
        noise = held.mean(square / relative)
        log = jnp.log(2 * math.pi * noise) + held.mean(jnp.log(relative))
        return 0.5 * (log + 1), noise

    def loss(log_ratio: jax.Array) -> jax.Array:
        return profile(jnp.exp(log_ratio))[0]

    low, high = _range(held, None)
    start_ratio = -jnp.log(given)
    nowhere = jnp.full_like(low, -jnp.inf)
    found = minimise(loss, low, high, jnp.stack([start_ratio, nowhere]))
    at_start, mean_only = found.elsewhere
    before = -held.mean(normal_log_density(residual, variance + given))
    point, after, boundary, keep = _chosen(
        found, low, high, start_ratio, at_start, before
    )
    noise = profile(jnp.exp(point))[1]
    scale = jnp.where(keep, jnp.ones_like(noise), noise * jnp.exp(point))
    noise = jnp.where(keep, given, noise)
    return Found(scale, noise, before, after, mean_only, boundary)


@functools.partial(jax.jit, static_argnums=(1, 2))
def with_dispersion(
    held: HeldOut, likelihood: Likelihood, value: Callable, start: jax.Array
) -> Found:
    """Scale and dispersion together: for each scale the best dispersion."""
    known_likelihood = likelihood.with_dispersion
    assert known_likelihood is not None
    dtype = held.outputs.variance.dtype

    def loss(log_scale: jax.Array, log_dispersion: jax.Array) -> jax.Array:
        outputs = densities.scaled(held.outputs, jnp.exp(log_scale))
        known = known_likelihood(jnp.exp(log_dispersion))
        return -held.mean(value(known, outputs, held.targets))

    widest = jnp.asarray(_DISPERSION_REACH, dtype)

    def best(log_scale: jax.Array, elsewhere: jax.Array) -> Minimum:
        return minimise(
            functools.partial(loss, log_scale),
            -widest,
            widest,
            elsewhere,
            num_points=13,
            num_halvings=14,
        )

    def profile(log_scale: jax.Array) -> jax.Array:
        return best(log_scale, jnp.zeros((0,), dtype)).value

    low, high = _range(held, likelihood)
    zero = jnp.zeros_like(low)
    elsewhere = jnp.stack([zero, jnp.full_like(low, -jnp.inf)])
    found = minimise(profile, low, high, elsewhere, num_points=21, num_halvings=14)
    at_start, mean_only = found.elsewhere
    given = jnp.log(start.astype(dtype))
    before = loss(zero, given)
    point, after, boundary, keep = _chosen(found, low, high, zero, at_start, before)
    point = jnp.where(keep, zero, point)
    dispersion = jnp.exp(best(point, jnp.zeros((0,), dtype)).point)
    dispersion = jnp.where(keep, jnp.exp(given), dispersion)
    return Found(jnp.exp(point), dispersion, before, after, mean_only, boundary)

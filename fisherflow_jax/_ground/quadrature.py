"""Averages of probabilities over a normal, by trapezoids."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import arrays

# A trapezoid over a normal is exact to rounding for what is smooth on its step.
NUM_NODES = 97
REACH = 6.0


def normal_nodes(dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Standard normal nodes, and the logarithms of their weights."""
    nodes = np.linspace(-REACH, REACH, NUM_NODES)
    logs = -np.square(nodes) / 2
    logs = logs - np.log(np.sum(np.exp(logs)))
    return jnp.asarray(nodes, dtype), jnp.asarray(logs, dtype)


def log_average(
    log_prob: Callable[[jax.Array], jax.Array], points: jax.Array, logs: jax.Array
) -> jax.Array:
    """`log sum_k exp(logs_k) p(points_k)`, a point at a time."""

    def add(carry: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        point, log_weight = part
        return jnp.logaddexp(carry, log_weight + log_prob(point)), None

    start = jax.eval_shape(log_prob, points[0])
    nothing = jnp.full(start.shape, -jnp.inf, start.dtype)
    return jax.lax.scan(add, nothing, (points, logs))[0]


def normal_log_density(residual: jax.Array, variance: jax.Array) -> jax.Array:
    """The log-density of a normal error."""
    square = jnp.square(residual) / variance
    return -0.5 * (square + jnp.log(variance) + math.log(2 * math.pi))


class SigmoidMoments(NamedTuple):
    """Of `sigma(z)`, z normal; each of the shape of the mean."""

    log_mean: jax.Array
    log_rest: jax.Array  # of the mean of 1 - sigma(z)
    variance: jax.Array


# Half steps over the normal where it is narrow, whole ones over the logistic elsewhere.
_NARROW = 2.0
_LOGISTIC_REACH = 24


def sigmoid_moments(mean: jax.Array, variance: jax.Array) -> SigmoidMoments:
    r"""The moments of the logistic-normal distribution, to a relative 1e-5.

    The variance, and a mean below 1e-7, to 1e-3. By trapezoids over the normal up to a
    standard deviation s of 2, and beyond over the logistic distribution, whose
    distribution function the sigmoid is:

    .. math:: \mathrm E\,\sigma(z) = \int \Phi\big(\tfrac{m - x}{s}\big) \sigma'(x) dx,
       \qquad \mathrm E\,\sigma(z)^2 = \int \Phi\big(\tfrac{m - x}{s}\big)
       2 \sigma(x) \sigma'(x) dx.

    Each is smooth on its step for every s. Only the smaller side is integrated.
    """
    below = mean < 0
    small = jnp.where(below, mean, -mean)
    std = arrays.safe_sqrt(variance)
    wide = std > _NARROW

    def all_narrow() -> tuple[jax.Array, jax.Array]:
        return _over_normal(small, jnp.where(wide, _NARROW, std))

    def some_wide() -> tuple[jax.Array, jax.Array]:
        pair = _over_logistic(small, jnp.where(wide, std, _NARROW)), all_narrow()
        log_mean, share = (jnp.where(wide, *x) for x in zip(*pair, strict=True))
        return log_mean, share

    log_small, share = jax.lax.cond(jnp.any(wide), some_wide, all_narrow)
    log_large = jnp.log1p(-jnp.exp(log_small))
    return SigmoidMoments(
        jnp.where(below, log_small, log_large),
        jnp.where(below, log_large, log_small),
        share * jnp.square(jnp.exp(log_small)),
    )


def _over_normal(mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the mean, and the variance over the squared mean."""
    # far enough for the square's peak, 2 s away where the sigmoid is an exponential
    nodes = np.arange(-16, 17) / 2
    weights = np.exp(-np.square(nodes) / 2)
    center = jax.nn.log_sigmoid(mean)

    def away(node: jax.Array) -> tuple[jax.Array, jax.Array]:
        relative = jnp.expm1(jax.nn.log_sigmoid(mean + std * node) - center)
        return relative, jnp.square(relative)

    first, second = _weighted(away, nodes, weights / weights.sum(), mean)
    variance = jnp.maximum(second - jnp.square(first), 0)
    return center + jnp.log1p(first), variance / jnp.square(1 + first)


def _over_logistic(mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, of a mean that is not above zero."""
    # the peak of what is integrated, where far below zero
    center = jnp.minimum(mean + jnp.square(std), 0)
    nodes = np.arange(-_LOGISTIC_REACH, _LOGISTIC_REACH + 1.0)

    def log_below(point: jax.Array) -> jax.Array:
        return jax.scipy.special.log_ndtr((mean - point) / std)

    at_center = log_below(center)

    def parts(node: jax.Array) -> tuple[jax.Array, jax.Array]:
        point = center + node
        # over exp(center): the logistic density is e / (1 + e)^2
        size = jnp.abs(point)
        inverse = 1 / (1 + jnp.exp(-size))
        log_part = log_below(point) - at_center - size - center
        part = jnp.exp(log_part) * jnp.square(inverse)
        return part, part * jnp.where(point < 0, 1 - inverse, inverse)

    first, second = _weighted(parts, nodes, np.ones_like(nodes), mean)
    log_unit = at_center + center
    square = 2 * second / jnp.square(first) * jnp.exp(-log_unit)
    return log_unit + jnp.log(first), jnp.maximum(square - 1, 0)


def _weighted(
    function: Callable, nodes: np.ndarray, weights: np.ndarray, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`sum_k weights_k function(nodes_k)`, of two values, a node at a time."""

    def add(sums: tuple, part: tuple) -> tuple[tuple, None]:
        node, weight = part
        values = function(node)
        return tuple(s + weight * v for s, v in zip(sums, values, strict=True)), None

    zero = jnp.zeros_like(like)
    steps = jnp.asarray(nodes, like.dtype), jnp.asarray(weights, like.dtype)
    return jax.lax.scan(add, (zero, zero), steps)[0]

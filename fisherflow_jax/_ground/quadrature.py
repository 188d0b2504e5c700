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
# Below, the normal distribution function is too small, and its series good enough.
_DEEP = -10.0


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
        log_mean, variance = (jnp.where(wide, *x) for x in zip(*pair, strict=True))
        return log_mean, variance

    log_small, variance = jax.lax.cond(jnp.any(wide), some_wide, all_narrow)
    log_large = jnp.log1p(-jnp.exp(log_small))
    return SigmoidMoments(
        jnp.where(below, log_small, log_large),
        jnp.where(below, log_large, log_small),
        variance,
    )


def _over_normal(mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the mean, and the variance."""
    # far enough for the square's peak, 2 s away where the sigmoid is an exponential
    nodes = np.arange(17) / 2
    weights = np.exp(-np.square(nodes) / 2)
    weights /= 2 * weights.sum() - 1
    odds = jnp.exp(mean)

    def both_sides(node: jax.Array) -> tuple[jax.Array, jax.Array]:
        # with g = e^d - 1: sigma(m + d) / sigma(m) - 1 = g / (1 + e^m (1 + g))
        growth = jnp.expm1(std * node)
        up = growth / (1 + odds * (1 + growth))
        down = -growth / (1 + odds + growth)
        return up + down, jnp.square(up) + jnp.square(down)

    first, second = _weighted(both_sides, nodes[1:], weights[1:], mean)
    variance = jnp.maximum(second - jnp.square(first), 0)
    variance = variance * jnp.square(jax.nn.sigmoid(mean))
    return jax.nn.log_sigmoid(mean) + jnp.log1p(first), variance


def _over_logistic(mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, of a mean that is not above zero."""
    # the peak of what is integrated, where far below zero
    center = jnp.minimum(mean + jnp.square(std), 0)
    nodes = np.arange(-_LOGISTIC_REACH, _LOGISTIC_REACH + 1.0)
    middle = (mean - center) / std  # -s or above
    deep = middle < _DEEP
    at_middle = jax.scipy.special.log_ndtr(middle)

    def tail(x: jax.Array) -> jax.Array:
        """The normal distribution function over its density, by the series."""
        x = jnp.where(deep, x, _DEEP)
        inverse = 1 / jnp.square(x)
        return -(1 + inverse * (-1 + inverse * (3 - 15 * inverse))) / x

    unit = 1 / jnp.where(deep, tail(middle), 2 * jnp.exp(at_middle))

    def parts(node: jax.Array) -> tuple[jax.Array, jax.Array]:
        point, away = center + node, node / std
        argument = middle - away
        # over exp(center): the logistic density is e / (1 + e)^2
        size = jnp.abs(point)
        inverse = 1 / (1 + jnp.exp(-size))
        rise = jnp.where(deep, away * (middle - away / 2), 0)
        below = jax.lax.erfc(argument * -(0.5**0.5))
        below = jnp.where(deep, tail(argument), below)
        part = unit * below * jnp.exp(rise - size - center) * jnp.square(inverse)
        return part, part * jnp.where(point < 0, 1 - inverse, inverse)

    first, second = _weighted(parts, nodes, np.ones_like(nodes), mean)
    log_unit = at_middle + center
    log_mean = log_unit + jnp.log(first)
    square = 2 * second * jnp.exp(log_unit)
    return log_mean, jnp.maximum(square - jnp.exp(2 * log_mean), 0)


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

"""Averages of probabilities over a normal, in logarithms."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

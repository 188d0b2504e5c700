"""Logistic regression for the benchmarks: data, the flow, and batch Newton."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve

import fisherflow_jax as ff

NUM_FEATURES = 20
PRIOR_PRECISION = 1e-2
# Newton stops where the flow does: after a step shorter than 1e-4 posterior sd.
_TOLERANCE = 1e-8


class Gaussian(NamedTuple):
    """A posterior, as every method reports it."""

    mean: jax.Array  # (d,)
    sd: jax.Array  # (d,)


class Newton(NamedTuple):
    """Where batch Newton ended."""

    mean: jax.Array  # (d,)
    hessian: jax.Array  # (d, d) of the negative log-posterior
    steps: jax.Array  # ()


def data(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal features with correlation 0.5, and labels 0 or 1, float64."""
    rng = np.random.default_rng(seed)
    coefficients = 0.3 * np.random.default_rng(0).standard_normal(NUM_FEATURES)
    features = rng.standard_normal((num_rows, NUM_FEATURES))
    features = np.sqrt(0.5) * (features + rng.standard_normal((num_rows, 1)))
    chance = 1 / (1 + np.exp(-features @ coefficients))
    return features, (rng.random(num_rows) < chance).astype(np.float64)


def flow(**options: Any) -> ff.FisherFlow:
    return ff.fisher_flow(
        lambda params, inputs: inputs @ params,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=PRIOR_PRECISION,
        **options,
    )


def sums(theta: jax.Array, x: jax.Array, y: jax.Array, used: jax.Array) -> tuple:
    """Minus log-likelihood, its gradient and its Hessian, over the used rows."""
    logits = x @ theta
    chance = jax.nn.sigmoid(logits)
    value = jnp.sum(used * (jnp.logaddexp(0.0, logits) - y * logits))
    weights = used * chance * (1 - chance)
    return value, (used * (chance - y)) @ x, x.T @ (x * weights[:, None])


def chunked_sums(theta: jax.Array, x: jax.Array, y: jax.Array, count: Any) -> tuple:
    """`sums` over the first `count` rows of chunks `(m, c, d)`, the rest unread."""
    length = x.shape[1]

    def add(chunk: jax.Array, total: tuple) -> tuple:
        used = (chunk * length + jnp.arange(length) < count).astype(x.dtype)
        return jax.tree.map(jnp.add, total, sums(theta, x[chunk], y[chunk], used))

    matrix = jnp.zeros((theta.size, theta.size), x.dtype)
    zero = (jnp.zeros((), x.dtype), jnp.zeros_like(theta), matrix)
    return jax.lax.fori_loop(0, (count + length - 1) // length, add, zero)


def newton(terms: Callable[[jax.Array], tuple], start: jax.Array) -> Newton:
    """Damped Newton to convergence; what a trial computed serves the next step."""

    def penalised(theta: jax.Array) -> tuple:
        value, gradient, hessian = terms(theta)
        return (
            value + 0.5 * PRIOR_PRECISION * theta @ theta,
            gradient + PRIOR_PRECISION * theta,
            hessian + PRIOR_PRECISION * jnp.eye(theta.size, dtype=theta.dtype),
        )

    def body(state: tuple) -> tuple:
        theta, (value, gradient, hessian), _, steps = state
        direction = -cho_solve(cho_factor(hessian), gradient)

        def worse(trial: tuple) -> jax.Array:
            size, (trial_value, *_) = trial
            return ~(trial_value <= value + 1e-12 * jnp.abs(value)) & (size > 1e-6)

        def halve(trial: tuple) -> tuple:
            size = trial[0] / 2
            return size, penalised(theta + size * direction)

        first = (jnp.ones((), theta.dtype), penalised(theta + direction))
        size, at = jax.lax.while_loop(worse, halve, first)
        return theta + size * direction, at, -gradient @ direction, steps + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[2] > _TOLERANCE) & (state[3] < 100)

    infinity = jnp.asarray(jnp.inf, start.dtype)
    state = (start, penalised(start), infinity, jnp.asarray(0, jnp.int32))
    theta, (_, _, hessian), _, steps = jax.lax.while_loop(unfinished, body, state)
    return Newton(theta, hessian, steps)


def laplace(fit: Newton) -> Gaussian:
    return Gaussian(fit.mean, jnp.sqrt(jnp.diagonal(jnp.linalg.inv(fit.hessian))))

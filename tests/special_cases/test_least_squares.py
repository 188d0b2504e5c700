"""Linear-Gaussian streams as textbook least squares, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

ROWS, SIZE, PRECISION = 40, 4, 0.3

_rng = np.random.default_rng(3)
INPUTS = _rng.normal(size=(ROWS, SIZE)) @ _rng.normal(size=(SIZE, SIZE))
TARGETS = INPUTS @ np.array([1.0, 0.0, -1.0, 2.0]) + _rng.normal(size=ROWS)


def stream(memory, batch_size, order=None, scale=1.0):
    rows = np.arange(ROWS) if order is None else order
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(scale),
        structure=ff.structures.full(),
        memory=memory,
        prior_precision=PRECISION,
    )
    batches = (
        jnp.asarray(INPUTS[rows].reshape(-1, batch_size, SIZE)),
        jnp.asarray(TARGETS[rows].reshape(-1, batch_size)),
    )
    return jax.lax.scan(flow.update, flow.init(jnp.zeros(SIZE)), batches)[0]


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_recursive_least_squares_with_forgetting(decay):
    theta, covariance = np.zeros(SIZE), np.eye(SIZE) / PRECISION
    for x, y in zip(INPUTS, TARGETS, strict=True):
        gain = covariance @ x / (decay + x @ covariance @ x)
        theta = theta + gain * (y - x @ theta)
        covariance = (covariance - np.outer(gain, x @ covariance)) / decay
    state = stream(ff.memories.exponential(decay, floor=False), 1)
    np.testing.assert_allclose(state.mean, theta, rtol=1e-9)
    np.testing.assert_allclose(
        np.linalg.inv(ff.information.to_dense(state.information)),
        covariance,
        rtol=1e-9,
    )


@pytest.mark.parametrize("batch_size", [1, 5, 40])
def test_bayes_and_ridge_in_any_order(batch_size):
    scale = 0.5
    information = INPUTS.T @ INPUTS / scale**2 + PRECISION * np.eye(SIZE)
    ridge = np.linalg.solve(information, INPUTS.T @ TARGETS / scale**2)
    order = np.random.default_rng(1).permutation(ROWS)
    state = stream(ff.memories.stationary(), batch_size, order, scale)
    np.testing.assert_allclose(state.mean, ridge, rtol=1e-10)
    np.testing.assert_allclose(
        ff.information.to_dense(state.information), information, rtol=1e-10
    )


def test_running_mean_and_its_standard_error():
    values = _rng.normal(size=30) + 2.0
    flow = ff.fisher_flow(
        lambda params, x: x * params,
        ff.likelihoods.gaussian(scale=None),
        structure=ff.structures.scalar(),
        memory=ff.memories.stationary(),
        prior_precision=1e-10,
    )
    state = flow.init(jnp.array(0.0))
    for count, value in enumerate(values, start=1):
        state, _ = flow.update(state, (jnp.ones(1), jnp.array([value])))
        np.testing.assert_allclose(state.mean, values[:count].mean(), rtol=1e-8)
    error = values.std(ddof=1) / np.sqrt(len(values))
    np.testing.assert_allclose(ff.standard_error(state), error, rtol=1e-8)

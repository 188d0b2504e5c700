"""Generalised linear models: the extended Kalman filter and renewable estimation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

BATCHES, ROWS, SIZE, PRECISION = 10, 6, 3, 2.0

_rng = np.random.default_rng(8)
INPUTS = 0.6 * _rng.normal(size=(BATCHES, ROWS, SIZE))
LINE = INPUTS @ np.array([0.8, -0.5, 0.3])


def logistic(z):
    return 1 / (1 + np.exp(-z))


# the mean and its derivative, which for a canonical link is the variance
MODELS = {
    "poisson": (ff.likelihoods.poisson(), np.exp, np.exp),
    "bernoulli": (
        ff.likelihoods.bernoulli(),
        logistic,
        lambda z: logistic(z) * logistic(-z),
    ),
}
TARGETS = {
    "poisson": _rng.poisson(np.exp(LINE)).astype(float),
    "bernoulli": (_rng.uniform(size=LINE.shape) < logistic(LINE)).astype(float),
}


def stream(name, num_steps):
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        MODELS[name][0],
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=PRECISION,
        num_steps=num_steps,
    )
    batches = (jnp.asarray(INPUTS), jnp.asarray(TARGETS[name]))
    return jax.lax.scan(flow.update, flow.init(jnp.zeros(SIZE)), batches)[0]


@pytest.mark.parametrize("name", MODELS)
def test_one_step_is_the_extended_kalman_filter(name):
    _, mean, variance = MODELS[name]
    theta, covariance = np.zeros(SIZE), np.eye(SIZE) / PRECISION
    for x, y in zip(INPUTS, TARGETS[name], strict=True):
        # in moment form: H the Jacobian of the mean, R the variance of the target
        rate = x @ theta
        jacobian, noise = variance(rate)[:, None] * x, np.diag(variance(rate))
        innovation = jacobian @ covariance @ jacobian.T + noise
        gain = covariance @ jacobian.T @ np.linalg.inv(innovation)
        theta = theta + gain @ (y - mean(rate))
        covariance = covariance - gain @ jacobian @ covariance
    state = stream(name, num_steps=1)
    np.testing.assert_allclose(state.mean, theta, rtol=1e-9)
    np.testing.assert_allclose(
        np.linalg.inv(ff.information.to_dense(state.information)),
        covariance,
        rtol=1e-9,
    )


@pytest.mark.parametrize("name", MODELS)
def test_converged_steps_are_renewable_estimation(name):
    # Luo and Song, 2020: the batch's own score plus the pull of the summed Hessians
    _, mean, variance = MODELS[name]
    theta, hessians = np.zeros(SIZE), PRECISION * np.eye(SIZE)
    for x, y in zip(INPUTS, TARGETS[name], strict=True):
        old = theta
        for _ in range(50):
            equation = hessians @ (old - theta) + x.T @ (y - mean(x @ theta))
            slope = hessians + x.T @ (variance(x @ theta)[:, None] * x)
            theta = theta + np.linalg.solve(slope, equation)
        hessians = hessians + x.T @ (variance(x @ theta)[:, None] * x)
    state = stream(name, num_steps=30)
    np.testing.assert_allclose(state.mean, theta, rtol=1e-7)
    np.testing.assert_allclose(
        ff.information.to_dense(state.information), hessians, rtol=1e-7
    )

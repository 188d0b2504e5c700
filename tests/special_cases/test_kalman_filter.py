"""A flow with a linear-Gaussian model is a Kalman filter: against dynamax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

NOISE = 0.1 * np.array([[1.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.5]])
MOVE = np.array([[0.9, 0.2, 0.0], [-0.1, 1.0, 0.3], [0.0, 0.1, 0.8]])
CASES = {
    "nothing": (None, np.zeros((3, 3)), np.eye(3)),
    "noise": ((NOISE, None), NOISE, np.eye(3)),
    "noise and transition": ((NOISE, MOVE), NOISE, MOVE),
}


@functools.cache
def compiled(function):
    return jax.jit(function)


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES)
def test_means_covariances_and_evidence_are_dynamax_lgssm_filters(case):
    dynamax = pytest.importorskip("dynamax.linear_gaussian_ssm")
    forms, noise, move = CASES[case]
    memory = ff.memories.random_walk(*forms) if forms else ff.memories.stationary()
    flow = ff.fisher_flow(
        streams.linear,
        ff.likelihoods.gaussian(streams.SCALE),
        structure=ff.structures.full(),
        memory=memory,
        prior_precision=streams.PRECISION,
        num_steps=1,
    )
    batches = streams.batches(4, weights=np.ones(24))
    states = streams.run(flow, streams.start(flow), batches)

    # dynamax starts at the first observation, so its start is ours one step on
    start = move @ move.T / streams.PRECISION + noise
    params = dynamax.LinearGaussianSSM(3, 4).initialize(
        initial_mean=jnp.asarray(move @ streams.ORIGIN),
        initial_covariance=jnp.asarray(start),
        dynamics_weights=jnp.asarray(move),
        dynamics_covariance=jnp.asarray(noise),
        emission_weights=jnp.asarray(np.stack([inputs for inputs, _, _ in batches])),
        emission_covariance=streams.SCALE**2 * jnp.eye(4),
    )[0]
    observed = jnp.asarray(np.stack([targets for _, targets, _ in batches]))
    expected = compiled(dynamax.lgssm_filter)(params, observed)

    for time, state in enumerate(states):
        np.testing.assert_allclose(
            streams.flat(state.mean), expected.filtered_means[time], rtol=1e-8
        )
        np.testing.assert_allclose(
            np.linalg.inv(streams.dense(state.information)),
            expected.filtered_covariances[time],
            atol=1e-8,
        )
    np.testing.assert_allclose(
        states[-1].log_evidence, expected.marginal_loglik, rtol=1e-8
    )

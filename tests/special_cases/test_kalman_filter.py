"""Linear-Gaussian, full structure: the Kalman filter of another library."""

import dynamax.linear_gaussian_ssm.inference as lgssm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

STEPS, ROWS, SIZE, SCALE, PRECISION = 12, 4, 3, 0.7, 0.5

_rng = np.random.default_rng(5)
INPUTS = _rng.normal(size=(STEPS, ROWS, SIZE))
TARGETS = INPUTS @ np.array([1.0, -2.0, 0.5]) + SCALE * _rng.normal(size=(STEPS, ROWS))
ROTATION = np.array([[0.9, 0.2, 0.0], [-0.2, 0.9, 0.1], [0.0, 0.0, 0.8]])
_root = _rng.normal(size=(SIZE, SIZE))
COUPLED = 0.05 * _root @ _root.T


def dynamax_filter(noise, transition):
    """Means and covariances after each batch, and the log-likelihood of all."""
    # dynamax filters from a state already predicted for the first emission
    covariance = transition @ (np.eye(SIZE) / PRECISION) @ transition.T + noise
    parameters = lgssm.ParamsLGSSM(
        initial=lgssm.ParamsLGSSMInitial(jnp.zeros(SIZE), jnp.asarray(covariance)),
        dynamics=lgssm.ParamsLGSSMDynamics(
            jnp.asarray(transition),
            jnp.zeros(SIZE),
            jnp.zeros((SIZE, 0)),
            jnp.asarray(noise),
        ),
        emissions=lgssm.ParamsLGSSMEmissions(
            jnp.asarray(INPUTS),
            jnp.zeros(ROWS),
            jnp.zeros((ROWS, 0)),
            SCALE**2 * jnp.eye(ROWS),
        ),
    )
    return lgssm.lgssm_filter(parameters, jnp.asarray(TARGETS))


CASES = {
    "still": (None, None),
    "noise": (0.02, None),
    "noise_by_parameter": (np.array([0.0, 0.1, 0.02]), None),
    "coupled_noise": (COUPLED, None),
    "transition": (0.02, ROTATION),
    "coupled_noise_and_transition": (COUPLED, ROTATION),
    "shrinking": (0.02, 0.9),
}


def as_matrix(value, default):
    if value is None:
        return default * np.eye(SIZE)
    value = np.asarray(value, float)
    return value if value.ndim == 2 else np.diag(np.broadcast_to(value, SIZE))


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_equals_dynamax(case, num_steps):
    noise, transition = CASES[case]
    memory = ff.memories.stationary()
    if noise is not None:
        memory = ff.memories.random_walk(noise, transition)
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(SCALE),
        structure=ff.structures.full(),
        memory=memory,
        prior_precision=PRECISION,
        num_steps=num_steps,
    )

    def step(state, batch):
        state, _ = flow.update(state, batch)
        return state, (state.mean, ff.information.to_dense(state.information))

    batches = (jnp.asarray(INPUTS), jnp.asarray(TARGETS))
    state, (means, precisions) = jax.lax.scan(step, flow.init(jnp.zeros(SIZE)), batches)
    reference = dynamax_filter(as_matrix(noise, 0.0), as_matrix(transition, 1.0))
    np.testing.assert_allclose(means, reference.filtered_means, rtol=0, atol=1e-8)
    np.testing.assert_allclose(
        np.linalg.inv(precisions), reference.filtered_covariances, rtol=0, atol=1e-8
    )
    np.testing.assert_allclose(state.log_evidence, reference.marginal_loglik, atol=1e-6)

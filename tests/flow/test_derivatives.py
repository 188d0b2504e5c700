"""Derivatives of a stream in what it was told: noise, scale, decay and prior."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 5, 2))
LINES = X @ np.array([0.4, -0.3])
MODELS = {
    # likelihood of a number, targets, memory of another
    "gaussian": (
        lambda a: ff.likelihoods.gaussian(jnp.exp(a)),
        LINES + 0.5 * RNG.normal(size=LINES.shape),
        lambda b: ff.memories.exponential(jax.nn.sigmoid(b + 3)),
    ),
    "poisson": (
        lambda a: ff.likelihoods.poisson(),
        RNG.poisson(np.exp(LINES)),
        lambda b: ff.memories.random_walk(jnp.exp(b - 4)),
    ),
}


def stream(name, told):
    likelihood, targets, memory = MODELS[name]
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        likelihood(told[0]),
        memory=memory(told[1]),
        prior_precision=jnp.exp(told[2]),
    )
    state, _ = jax.lax.scan(flow.update, flow.init(jnp.zeros(2)), (X, targets))
    matrix = ff.information.to_dense(state.information, state.mean)
    return state.log_evidence, state.mean, matrix


ESTIMATED = {
    "student_t": (
        ff.likelihoods.student_t(None, None),
        LINES[:8] + 0.5 * RNG.standard_t(4, size=(8, 5)),
    ),
    "negative_binomial": (
        ff.likelihoods.negative_binomial(None),
        RNG.negative_binomial(2, 2 / (2 + np.exp(LINES[:20]))).astype(float),
    ),
}
WEIGHTS = np.random.default_rng(1).normal(size=40)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["student_t", pytest.param("negative_binomial", marks=pytest.mark.slow)]
)
def test_what_is_estimated_beside_the_mean_has_derivatives_too(name):
    """Of a sum of all that is believed, through the common solution.

    Short steps too: what the turns to the solution leave of it is divided by them.
    """
    likelihood, targets = ESTIMATED[name]

    def believed(told):
        flow = ff.fisher_flow(
            lambda params, x: x @ params,
            likelihood,
            memory=ff.memories.exponential(jax.nn.sigmoid(told[0] + 3)),
            prior_precision=jnp.exp(told[1]),
        )
        start = flow.init(jnp.zeros(2))
        state, _ = jax.lax.scan(flow.update, start, (X[: len(targets)], targets))
        parts = state.log_evidence, state.mean, state.nuisance.mean
        matrices = state.information, state.nuisance.information
        dense = [ff.information.to_dense(x) for x in matrices]
        flat = jax.flatten_util.ravel_pytree((parts, dense))[0]
        return flat @ WEIGHTS[: flat.size]

    run = jax.jit(jax.value_and_grad(believed))  # one program for all
    told = np.array([0.2, -0.3])
    found = run(told)[1]
    for step in (2e-2, 5e-3):
        for k in range(2):
            places = told + step * np.outer([-2, -1, 1, 2], np.eye(2)[k])
            values = np.array([run(place)[0] for place in places])
            difference = values @ [1, -8, 8, -1] / (12 * step)
            np.testing.assert_allclose(found[k], difference, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_are_the_limits_of_differences(name):
    told, step = jnp.array([0.1, 0.2, -0.3]), 2e-2

    forward = jax.jit(jax.jacfwd(lambda t: stream(name, t)))(told)
    backward = jax.jit(jax.grad(lambda t: stream(name, t)[0]))(told)
    places = told + step * jnp.kron(jnp.eye(3), jnp.array([-2, -1, 1, 2.0])[:, None])
    values = jax.jit(jax.vmap(lambda t: stream(name, t)))(places)
    weights = np.array([1, -8, 8, -1]) / (12 * step)
    for found, value in zip(forward, values, strict=True):
        value = value.reshape((3, 4, *value.shape[1:]))
        difference = np.moveaxis(np.einsum("k,ik...->i...", weights, value), 0, -1)
        scale = np.abs(difference).max()
        np.testing.assert_allclose(found, difference, atol=1e-6 * scale)
    np.testing.assert_allclose(backward, forward[0], rtol=1e-9, atol=1e-9)

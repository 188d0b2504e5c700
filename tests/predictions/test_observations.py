"""New observations: known, learned and per-input noise; draws of all parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS

LINEAR = MODELS["linear"]
POSTERIOR = cases.state("linear", "diagonal")


def location(params, x):
    return LINEAR.apply_fn(params, x)[:, 0]


def two_heads(params, x):
    return LINEAR.apply_fn(params, x)[:, :2]


def test_known_noise():
    likelihood = ff.likelihoods.gaussian(scale=0.7)
    found = ff.predict(POSTERIOR, location, likelihood, LINEAR.inputs)
    np.testing.assert_allclose(
        found.observation_std, np.sqrt(found.std**2 + 0.49), rtol=1e-12
    )
    lower, upper = ff.predictions.observation_interval(found, likelihood, 0.9)
    exact = stats.norm(found.mean, found.observation_std).interval(0.9)
    np.testing.assert_allclose([lower, upper], exact, rtol=1e-10)


def test_noise_found_afterwards():
    unknown = ff.likelihoods.gaussian(scale=None)
    known = unknown.with_dispersion(jnp.asarray(0.49))
    found = ff.predict(POSTERIOR, location, known, LINEAR.inputs)
    wanted = ff.predict(
        POSTERIOR, location, ff.likelihoods.gaussian(scale=0.7), LINEAR.inputs
    )
    for value, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_noise_that_the_state_estimates(belief):
    likelihood = ff.likelihoods.gaussian(scale=None)
    design = np.asarray(LINEAR.inputs)
    y = np.random.default_rng(1).normal(size=6)
    fit, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    gram = design.T @ design
    state = belief(
        jnp.asarray(fit),
        ff.structures.Full(jnp.asarray(gram)),
        dispersion=jnp.asarray(residual[0] / 2),
        degrees_of_freedom=jnp.asarray(2.0),
        count=jnp.asarray(6.0),
    )
    found = ff.predict(state, lambda p, x: x @ p, likelihood, LINEAR.inputs)
    interval = ff.predictions.observation_interval(found, likelihood, state=state)
    # the textbook's prediction interval of least squares, two degrees of freedom
    leverage = np.einsum("ni,ij,nj->n", design, np.linalg.inv(gram), design)
    std = np.sqrt(residual[0] / 2 * (1 + leverage))
    exact = stats.t(2, design @ fit, std).interval(0.95)
    np.testing.assert_allclose(interval, exact, rtol=1e-8)


def test_noise_of_each_input():
    """Noise at the mean of the log-std head, and averaged over it by draws."""
    likelihood = ff.likelihoods.gaussian_location_scale()
    found = ff.predict(POSTERIOR, two_heads, likelihood, LINEAR.inputs)
    outputs = ff.predictions.linearized_outputs(
        POSTERIOR, two_heads, LINEAR.inputs, covariance=True
    )
    epistemic, noise = outputs.variance[:, 0], np.exp(2 * outputs.mean[:, 1])
    np.testing.assert_allclose(found.std**2, epistemic, rtol=1e-10)
    np.testing.assert_allclose(found.observation_std**2, epistemic + noise, rtol=1e-10)
    drawn = ff.predict(
        POSTERIOR,
        two_heads,
        likelihood,
        LINEAR.inputs,
        link=ff.predictions.output_samples(0, 20_000),
    )
    # E exp(2 s) of a normal s: the head's own uncertainty makes the noise larger
    larger = noise * np.exp(2 * outputs.variance[:, 1])
    np.testing.assert_allclose(drawn.observation_std**2, epistemic + larger, rtol=0.1)
    np.testing.assert_allclose(drawn.std, found.std, rtol=0.05)


def test_only_normal_errors_have_such_intervals():
    likelihood = ff.likelihoods.poisson()
    found = ff.predict(POSTERIOR, location, likelihood, LINEAR.inputs)
    with pytest.raises(ValueError, match=r"normal errors.*got poisson"):
        ff.predictions.observation_interval(found, likelihood)


def test_drawn_parameters_of_a_linear_model_are_its_linearisation():
    likelihood, count = ff.likelihoods.gaussian(scale=0.5), 4000
    drawn = jax.jit(
        lambda state: ff.predictions.weight_samples(
            state, LINEAR.apply_fn, likelihood, LINEAR.inputs, 0, count
        )
    )(POSTERIOR)
    found = ff.predict(POSTERIOR, LINEAR.apply_fn, likelihood, LINEAR.inputs)
    assert np.all(np.abs(drawn.mean - found.mean) < 5 * found.std / np.sqrt(count))
    np.testing.assert_allclose(drawn.std, found.std, rtol=0.06)
    np.testing.assert_allclose(drawn.observation_std, found.observation_std, rtol=0.06)


def test_drawn_parameters_of_a_network_collapse():
    """The trap: where the posterior is wide, draws are of another function."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8))
    params = {"w": jnp.asarray(rng.normal(size=(8, 30))), "v": jnp.ones((30, 1))}

    def apply_fn(params, x):
        return (jnp.tanh(5 * x @ params["w"]) @ params["v"])[:, 0]

    posterior = ff.Posterior(
        params, ff.structures.Scalar(jnp.asarray(0.05)), jnp.asarray(1.0)
    )
    arguments = posterior, apply_fn, ff.likelihoods.bernoulli(), jnp.asarray(x)
    linearised = ff.predict(*arguments)
    hidden = np.tanh(5 * x @ np.asarray(params["w"]))
    classes = hidden.sum(1) > 0
    drawn = jax.jit(
        lambda state: ff.predictions.weight_samples(state, *arguments[1:], 0, 50)
    )(posterior)
    assert np.mean((linearised.mean > 0.5) == classes) == 1
    assert np.mean((drawn.mean > 0.5) == classes) < 0.9


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2; got 0"):
        ff.predictions.weight_samples(
            POSTERIOR, location, ff.likelihoods.gaussian(), LINEAR.inputs, 0, 0
        )

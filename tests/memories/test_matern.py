"""A flow with a Matern memory is the Gaussian process, by its covariance matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import fisherflow_jax as ff

ORDERS = [0.5, 1.5, 2.5]
COUNT, NOISE = 40, 0.3
LENGTH, VARIANCE, STEP = 0.6, 1.3, 0.05
rng = np.random.default_rng(4)
GAPS = rng.uniform(0.0, 0.3, COUNT)
GAPS[5] = 0.0  # twice at one time
TARGETS = np.sin(6 * np.cumsum(GAPS)) + NOISE * rng.normal(size=COUNT)


def covariance(order, length, variance, times):
    """Matern's, by its Bessel function."""
    far = np.sqrt(2 * order) / length * np.abs(times[:, None] - times)
    near = np.where(far == 0, 1.0, far)
    found = 2 ** (1 - order) / special.gamma(order) * near**order
    return variance * np.where(far == 0, 1.0, found * special.kv(order, near))


def exact(order, times, length=LENGTH, variance=VARIANCE, noise=NOISE):
    """Means and variances at the times, and the log marginal likelihood."""
    prior = covariance(order, length, variance, times)
    spread = prior + noise**2 * np.eye(COUNT)
    means = prior @ np.linalg.solve(spread, TARGETS)
    variances = np.diag(prior - prior @ np.linalg.solve(spread, prior))
    _, logdet = np.linalg.slogdet(2 * np.pi * spread)
    evidence = -0.5 * (TARGETS @ np.linalg.solve(spread, TARGETS) + logdet)
    return means, variances, evidence


def gap(batch):
    return batch.inputs[0, 0]


def build(order, length=LENGTH, variance=VARIANCE, noise=NOISE, step=STEP):
    memory, prior, read_out = ff.memories.matern(order, length, variance, step)
    return ff.fisher_flow(
        read_out,
        ff.likelihoods.gaussian(noise),
        memory=memory,
        prior_precision=prior,
        prior_is="predicted",
        num_steps=1,
    )


def states_of(flow, order, gaps=GAPS):
    def step(state, batch):
        state, _ = flow.update(state, batch)
        return state, state

    batches = jnp.asarray(gaps)[:, None, None], jnp.asarray(TARGETS)[:, None]
    first = flow.init(jnp.zeros(int(order + 0.5)))
    return *jax.lax.scan(step, first, batches), batches


@pytest.mark.slow_cases
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("regular", [True, False], ids=["grid", "gaps"])
def test_it_is_the_gaussian_process(order, regular):
    flow = build(order, step=STEP if regular else gap)
    last, states, batches = states_of(flow, order)
    smoothed = ff.smooth(flow, states, None if regular else batches)
    times = STEP * np.arange(COUNT) if regular else np.cumsum(GAPS)
    means, variances, evidence = exact(order, times)
    np.testing.assert_allclose(smoothed.mean[:, 0], means, atol=1e-10)
    errors = jax.vmap(ff.standard_error)(smoothed)[:, 0]
    np.testing.assert_allclose(errors**2, variances, atol=1e-10)
    np.testing.assert_allclose(last.log_evidence, evidence, rtol=1e-11)


def test_derivatives_are_states():
    """The second entry is the slope, in units of the rate."""
    flow = build(1.5)
    _, states, _ = states_of(flow, 1.5)
    smoothed = ff.smooth(flow, states)
    times, rate = STEP * np.arange(COUNT), np.sqrt(3) / LENGTH
    far = times[:, None] - times
    across = -VARIANCE * rate**2 * far * np.exp(-rate * np.abs(far))
    spread = covariance(1.5, LENGTH, VARIANCE, times) + NOISE**2 * np.eye(COUNT)
    slopes = across @ np.linalg.solve(spread, TARGETS)
    np.testing.assert_allclose(rate * smoothed.mean[:, 1], slopes, atol=1e-10)


@pytest.mark.slow
def test_gradients_of_the_evidence():
    """In the logarithms of length scale, variance and noise, by differences."""

    @jax.jit
    def evidence(logs):
        length, variance, noise = jnp.exp(logs)
        flow = build(1.5, length, variance, noise, step=gap)
        return states_of(flow, 1.5)[0].log_evidence

    at = np.log([LENGTH, VARIANCE, NOISE])
    times = np.cumsum(GAPS)
    wanted = [
        exact(1.5, times, *np.exp(at + 1e-5 * move))[2]
        - exact(1.5, times, *np.exp(at - 1e-5 * move))[2]
        for move in np.eye(3)
    ]
    found = jax.grad(evidence)(jnp.asarray(at))
    np.testing.assert_allclose(found, np.array(wanted) / 2e-5, rtol=1e-6)


def test_forecasts():
    flow = build(2.5)
    last, _, _ = states_of(flow, 2.5)
    ahead = flow.advance(last, steps=3)
    times = STEP * np.arange(COUNT + 3)
    whole = covariance(2.5, LENGTH, VARIANCE, times)
    spread = whole[:COUNT, :COUNT] + NOISE**2 * np.eye(COUNT)
    weights = np.linalg.solve(spread, whole[:COUNT, -1])
    np.testing.assert_allclose(ahead.mean[0], weights @ TARGETS, atol=1e-10)
    error = np.sqrt(VARIANCE - weights @ whole[:COUNT, -1])
    np.testing.assert_allclose(ff.standard_error(ahead)[0], error, atol=1e-10)


@pytest.mark.slow
def test_short_steps_in_float32():
    """The noise of a step of 1/1000 length scale, lost by a difference of matrices."""
    means, variances, _ = exact(2.5, LENGTH / 1000 * np.arange(COUNT))
    with jax.enable_x64(False):
        flow = build(2.5, step=LENGTH / 1000)
        _, states, _ = states_of(flow, 2.5)
        smoothed = ff.smooth(flow, states)
        assert smoothed.mean.dtype == jnp.float32
        errors = jax.vmap(ff.standard_error)(smoothed)[:, 0]
    np.testing.assert_allclose(smoothed.mean[:, 0], means, atol=1e-3)
    np.testing.assert_allclose(errors, np.sqrt(variances), rtol=1e-2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": 1.0}, "half an odd number.*got 1.0"),
        ({"order": -0.5}, "half an odd number"),
        ({"length_scale": 0.0}, "length_scale must be positive"),
        ({"variance": -1.0}, "variance must be positive"),
        ({"step": -0.1}, "step must be finite and not negative; got -0.1"),
        ({"step": np.nan}, "step must be finite"),
        ({"step": np.ones(3)}, "step is one number.*a function of the batch"),
    ],
    ids=str,
)
def test_bad_input(wrong, message):
    rest = {"order": 1.5, "length_scale": 1.0, "variance": 1.0, "step": 0.1}
    with pytest.raises(ValueError, match=message):
        ff.memories.matern(**rest | wrong)


def test_a_step_backwards():
    flow = build(1.5, step=gap)
    update = functools.partial(flow.update, flow.init(jnp.zeros(2)))
    state, _ = flow.update(flow.init(jnp.zeros(2)), (jnp.ones((1, 1)), jnp.ones(1)))
    with pytest.raises(ValueError, match="step must be finite and not negative; got -"):
        flow.update(state, (-jnp.ones((1, 1)), jnp.ones(1)))
    with pytest.raises(ValueError, match="what the memory predicts is not finite"):
        flow.advance(state, (-jnp.ones((1, 1)), None))
    update = jax.jit(flow.update)
    after, info = update(state, (-jnp.ones((1, 1)), jnp.ones(1)))
    assert info.skipped
    assert after.num_skipped == 1
    np.testing.assert_array_equal(after.mean, state.mean)

"""The ways back that the changelog names for changed behaviour, each tried."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

_rng = np.random.default_rng(4)
INPUTS = np.column_stack([np.ones(40), _rng.normal(size=40)])
TARGETS = _rng.poisson(np.exp(1 + 0.3 * INPUTS[:, 1])).astype(float)
STACK = INPUTS.reshape(4, 10, 2), TARGETS.reshape(4, 10)


def linear(params, inputs):
    return inputs @ params


def flow_of(likelihood, **options):
    return ff.fisher_flow(linear, likelihood, prior_precision=0.1, **options)


def stream(flow, batches, dtype=float):
    batches = jax.tree.map(lambda x: jnp.asarray(x, dtype), batches)
    return jax.lax.scan(flow.update, flow.init(jnp.zeros(2, dtype)), batches)[0]


@pytest.mark.slow
def test_a_bad_row_costs_its_batch_by_weights():
    spoilt = STACK[1].copy()
    spoilt[2, 3] = np.nan
    sound = np.all(np.isfinite(spoilt), axis=1, keepdims=True).astype(float)
    flow = flow_of(ff.likelihoods.poisson())
    state = stream(flow, (STACK[0], spoilt, np.ones_like(spoilt) * sound))
    others = [part[[0, 1, 3]] for part in STACK]
    np.testing.assert_allclose(state.mean, stream(flow, tuple(others)).mean, rtol=1e-9)
    assert state.count == 30


@pytest.mark.slow
def test_integers_are_multiplicities_by_name():
    flow, times = flow_of(ff.likelihoods.poisson()), np.arange(40) % 3
    start = flow.init(jnp.zeros(2))
    named, _ = flow.update(start, ff.Batch(INPUTS, TARGETS, times))
    repeated, _ = flow.update(
        start, (np.repeat(INPUTS, times, 0), np.repeat(TARGETS, times))
    )
    np.testing.assert_allclose(named.mean, repeated.mean, rtol=1e-9)
    assert named.count == repeated.count == times.sum()


@pytest.mark.slow
def test_one_number_an_entry_in_float32():
    flows = [flow_of(ff.likelihoods.poisson(), compensated=c) for c in (None, False)]
    states = [stream(flow, STACK, jnp.float32) for flow in flows]
    kinds = [type(state.information) for state in states]
    assert kinds[1] is ff.structures.Full is not kinds[0]
    np.testing.assert_allclose(*(state.mean for state in states), rtol=1e-4)


def test_a_first_update_of_one_step():
    flow = flow_of(ff.likelihoods.poisson(), num_steps=1)
    state, _ = flow.update(flow.init(jnp.zeros(2)), (INPUTS, TARGETS))
    # the linear predictor is 0 there: scores y - 1, weights 1
    precision = INPUTS.T @ INPUTS + 0.1 * np.eye(2)
    step = np.linalg.solve(precision, INPUTS.T @ (TARGETS - 1))
    np.testing.assert_allclose(state.mean, step, rtol=1e-9)


@pytest.mark.slow
def test_the_dispersion_of_the_penalised_sum():
    state = stream(flow_of(ff.likelihoods.gaussian(scale=None)), STACK)
    precision = INPUTS.T @ INPUTS + 0.1 * np.eye(2)
    mean = np.linalg.solve(precision, INPUTS.T @ TARGETS)
    squares = np.sum((TARGETS - INPUTS @ mean) ** 2) + 0.1 * mean @ mean
    spare = 40 - 2 + 0.1 * np.trace(np.linalg.inv(precision))
    used = ff.information.effective(
        state.information, state.prior.precision, state.mean
    )
    former = state.residual / (state.count - used)
    np.testing.assert_allclose(former, squares / spare, rtol=1e-9)

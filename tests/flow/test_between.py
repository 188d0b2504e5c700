"""A state moved on without a search: by time alone, and by a mean found elsewhere."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

MISSING = streams.INPUTS[:4], streams.TARGETS[:4], np.zeros(4)
BATCH = streams.batches()[3]


@pytest.mark.slow_cases
@pytest.mark.parametrize("memory", streams.MEMORIES)
def test_time_passes_as_over_missing_batches(memory):
    flow, state = streams.flow("full", memory), streams.history(memory)[2]
    expected = state
    for _ in range(3):
        expected, _ = flow.update(expected, MISSING)
    chex.assert_trees_all_close(flow.advance(state, steps=3), expected, rtol=1e-12)
    chex.assert_trees_all_equal(flow.advance(state, steps=0), state)


@pytest.mark.parametrize("memory", ["stationary", "exponential", "unfloored"])
def test_it_is_what_the_next_update_begins_with(memory):
    ahead = streams.flow("full", memory).advance(streams.history(memory)[2])
    mean, information = streams.predict(memory, 3)
    np.testing.assert_allclose(streams.flat(ahead.mean), mean, rtol=1e-9)
    found = streams.dense(ahead.information)
    np.testing.assert_allclose(found, information, rtol=1e-9, atol=1e-12)


def test_a_forecast_of_a_drifting_state_widens():
    flow, state = streams.flow("full", "random_walk"), streams.history("random_walk")[2]
    ahead = jax.jit(flow.advance)(state, steps=5)
    wider = np.linalg.inv(streams.dense(state.information)) + 0.5 * np.eye(3)
    found = np.linalg.inv(streams.dense(ahead.information))
    np.testing.assert_allclose(found, wider, rtol=1e-9)
    assert ahead.count == state.count and ahead.step == state.step + 5


def test_noise_that_depends_on_the_batch_needs_one():
    memory = ff.memories.random_walk(lambda batch: jnp.sum(batch.inputs[:, 0]) ** 2)
    flow = ff.fisher_flow(streams.linear, ff.likelihoods.gaussian(), memory=memory)
    state = streams.start(flow)
    with pytest.raises(ValueError, match=r"function of the batch.*flow\.advance"):
        flow.advance(state)
    ahead = flow.advance(state, MISSING)
    noise = np.sum(MISSING[0][:, 0]) ** 2
    expected = np.full(3, np.sqrt(1 + noise))
    found = streams.flat(ff.standard_error(ahead))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


CASES = [
    *[("full", memory, "gaussian") for memory in streams.MEMORIES],
    *[(name, "exponential", "bernoulli") for name in ("diagonal", "block", "low_rank")],
]


@functools.cache
def built(*names):
    return streams.flow(*names, num_steps=50)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("structure", "memory", "likelihood"), CASES)
def test_what_an_update_found_is_taken_in_as_by_the_update(
    structure, memory, likelihood
):
    flow = built(structure, memory, likelihood)
    batch = streams.batches(4, likelihood)
    state = streams.run(flow, streams.start(flow), batch[:2])[-1]
    expected, _ = flow.update(state, batch[2])
    value, _, information = flow.evaluate(expected.mean, batch[2])
    weight = batch[2][2].sum()
    found = flow.absorb(state, expected.mean, information, weight, log_likelihood=value)
    chex.assert_trees_all_close(found, expected, rtol=1e-7, atol=1e-9)
    assert np.isnan(flow.absorb(state, expected.mean, information, weight).log_evidence)


def test_what_cannot_be_taken_in():
    flow = streams.flow("full", "stationary")
    state, mean = streams.history()[1], streams.tree(np.ones(3))
    _, _, information = flow.evaluate(mean, BATCH)
    with pytest.raises(ValueError, match="mean must be like the state's"):
        flow.absorb(state, {"level": mean["level"]}, information, 4)
    with pytest.raises(ValueError, match="as a Full; got a Diagonal"):
        flow.absorb(state, mean, ff.structures.Diagonal(mean), 4)
    with pytest.raises(ValueError, match="num_observations must be finite and not neg"):
        flow.absorb(state, mean, information, -1)
    broken = streams.tree(np.array([1.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="not finite"):
        flow.absorb(state, broken, information, 4)
    after = jax.jit(flow.absorb)(state, broken, information, 4)
    assert after.num_skipped == 1
    chex.assert_trees_all_equal(after.mean, state.mean)
    for options, what in (
        ({"robust": True}, "squared scores of robust=True"),
        ({"likelihood": "unknown"}, "unknown dispersion"),
    ):
        other = streams.flow("full", "stationary", **options)
        with pytest.raises(ValueError, match=what):
            other.absorb(streams.start(other), mean, information, 4)
    with pytest.raises(TypeError, match="a Gaussian is where a flow begins"):
        flow.advance(ff.posterior(mean, information, prior_precision=1.0))


@pytest.mark.slow
def test_forecasts_may_be_differentiated_backwards():
    """And with them a bank that weighs by scores of what its members predict."""
    x, y = np.ones((4, 2)), np.arange(8.0).reshape(4, 2)

    def flow(noise):
        return ff.fisher_flow(
            lambda p, x: x * p,
            ff.likelihoods.gaussian(1.0),
            memory=ff.memories.random_walk(noise),
            num_steps=1,
        )

    def score(noise):
        bank = ff.bank(
            [flow(noise), flow(2 * noise)], weigh_by=ff.calibration.log_score
        )
        state = bank.init(jnp.zeros(()))
        return jnp.sum(jax.lax.scan(bank.update, state, (x, y))[1].log_evidence)

    wanted = (score(0.3 + 1e-6) - score(0.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(score)(0.3), wanted, rtol=1e-6)

"""Smoothing: what the whole stream says of each time, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.linear_gaussian_ssm import lgssm_smoother
from dynamax.linear_gaussian_ssm.inference import (
    ParamsLGSSM,
    ParamsLGSSMDynamics,
    ParamsLGSSMEmissions,
    ParamsLGSSMInitial,
)

import fisherflow_jax as ff

TIMES, STATES, ROWS = 12, 3, 2
SCALE = 0.5
MOVE = np.array([[0.9, 0.2, 0.0], [0.0, 0.95, 0.1], [0.0, 0.0, 0.8]])
NOISE = np.diag([0.1, 0.05, 0.2]) + 0.01
rng = np.random.default_rng(2)
LOOKS = rng.normal(size=(TIMES, ROWS, STATES))
TARGETS = rng.normal(size=(TIMES, ROWS))
WEIGHTS = np.ones((TIMES, ROWS))
WEIGHTS[4] = 0  # a missing observation
WEIGHTS[7, 1] = 0
GAPS = np.array([1.0, 0.5, 2.0, 0.1, 3.0, 1.0, 0.0, 1.0, 1.0, 0.2, 1.0, 2.0])


def linear(params, inputs):
    return inputs @ jnp.concatenate([params["level"][None], params["slope"]])


def build(memory, **options):
    return ff.fisher_flow(
        linear, ff.likelihoods.gaussian(SCALE), memory=memory, **options
    )


def start(flow):
    return flow.init({"level": jnp.zeros(()), "slope": jnp.zeros(2)})


def filtered(flow, batches, first=None):
    """The states after each update."""

    def step(state, batch):
        state, _ = flow.update(state, batch)
        return state, state

    return jax.lax.scan(step, start(flow) if first is None else first, batches)[1]


def dense(states):
    """Means `(T, d)` and covariances `(T, d, d)`."""
    means = np.concatenate([states.mean["level"][:, None], states.mean["slope"]], 1)
    return means, np.linalg.inv(jax.vmap(ff.information.to_dense)(states.information))


def joint(moves, noises, first, scale=SCALE, weights=WEIGHTS, targets=TARGETS):
    """Means and covariances of all times, by one solve with the joint precision."""
    precision = np.zeros((TIMES, STATES, TIMES, STATES))
    shift = np.zeros((TIMES, STATES))
    for time in range(TIMES):
        rows = weights[time][:, None] * LOOKS[time] / scale**2
        precision[time, :, time] += rows.T @ LOOKS[time]
        shift[time] += rows.T @ targets[time]
        if time == 0:
            precision[0, :, 0] += np.linalg.inv(first)
            continue
        inverse, move = np.linalg.inv(noises[time]), moves[time]
        precision[time, :, time] += inverse
        precision[time - 1, :, time - 1] += move.T @ inverse @ move
        precision[time, :, time - 1] -= inverse @ move
        precision[time - 1, :, time] -= move.T @ inverse
    covariance = np.linalg.inv(precision.reshape(TIMES * STATES, -1))
    means = (covariance @ shift.ravel()).reshape(TIMES, STATES)
    blocks = covariance.reshape(TIMES, STATES, TIMES, STATES)
    return means, blocks[np.arange(TIMES), :, np.arange(TIMES)]


def close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


BATCHES = LOOKS, TARGETS, WEIGHTS


@pytest.mark.slow_cases
@pytest.mark.parametrize("prior_is", ["previous", "predicted"])
def test_equal_to_the_joint_solve(prior_is):
    flow = build(ff.memories.random_walk(NOISE, MOVE), prior_is=prior_is)
    first = MOVE @ MOVE.T + NOISE if prior_is == "previous" else np.eye(STATES)
    wanted = joint([MOVE] * TIMES, [NOISE] * TIMES, first)
    smoothed = ff.smooth(flow, filtered(flow, BATCHES))
    close(dense(smoothed), wanted, 1e-12)
    errors = jax.vmap(ff.standard_error)(smoothed)
    entries = np.sqrt(wanted[1][:, range(STATES), range(STATES)])
    np.testing.assert_allclose(errors["level"], entries[:, 0], rtol=1e-12)
    np.testing.assert_allclose(errors["slope"], entries[:, 1:], rtol=1e-12)


@pytest.mark.slow
def test_equal_to_dynamax():
    flow = build(ff.memories.random_walk(NOISE, MOVE), prior_is="predicted")
    batches = LOOKS, TARGETS
    smoothed = ff.smooth(flow, filtered(flow, batches))
    model = ParamsLGSSM(
        ParamsLGSSMInitial(jnp.zeros(STATES), jnp.eye(STATES)),
        ParamsLGSSMDynamics(jnp.array(MOVE), None, None, jnp.array(NOISE)),
        ParamsLGSSMEmissions(jnp.array(LOOKS), None, None, SCALE**2 * jnp.eye(ROWS)),
    )
    wanted = lgssm_smoother(model, jnp.array(TARGETS))
    close(dense(smoothed), (wanted.smoothed_means, wanted.smoothed_covariances), 1e-7)


@pytest.mark.slow
def test_gaps_in_time_and_lists():
    """Noise and transition of each batch's own gap; a gap of nothing is allowed."""

    def gap(batch):
        return batch.inputs["gap"][0]

    def looked(params, inputs):
        return linear(params, inputs["look"])

    noise = np.diag([0.1, 0.05, 0.2])
    flow = ff.fisher_flow(
        looked,
        ff.likelihoods.gaussian(SCALE),
        memory=ff.memories.random_walk(lambda batch: gap(batch) * noise),
        prior_is="predicted",
    )
    gaps = np.repeat(GAPS[:, None], ROWS, 1)
    batches = {"look": LOOKS, "gap": gaps}, TARGETS, WEIGHTS
    states = filtered(flow, batches)
    smoothed = ff.smooth(flow, states, batches)
    noises = [np.maximum(gap, 1e-9) * noise for gap in GAPS]
    close(dense(smoothed), joint([np.eye(3)] * TIMES, noises, np.eye(3)), 1e-6)
    each = [
        jax.tree.map(lambda x, t=t: jnp.asarray(x[t]), batches) for t in range(TIMES)
    ]
    listed = [jax.tree.map(lambda x, t=t: x[t], states) for t in range(TIMES)]
    close(dense(ff.smooth(flow, listed, each)), dense(smoothed), 1e-14)
    with pytest.raises(ValueError, match="function of the batch"):
        ff.smooth(flow, states)
    with pytest.raises(ValueError, match=r"12 states.*\[\(11,\)\]"):
        ff.smooth(flow, states, jax.tree.map(lambda x: x[1:], batches))


@pytest.mark.slow
def test_an_unknown_dispersion_is_that_of_the_whole_stream():
    memory = ff.memories.random_walk(NOISE, MOVE)
    flow = ff.fisher_flow(linear, ff.likelihoods.gaussian(scale=None), memory=memory)
    states = filtered(flow, BATCHES)
    smoothed = ff.smooth(flow, states)
    last = jax.tree.map(lambda x: x[-1], states)
    np.testing.assert_allclose(smoothed.dispersion, last.dispersion, rtol=1e-12)
    wanted = joint([MOVE] * TIMES, [NOISE] * TIMES, MOVE @ MOVE.T + NOISE, scale=1.0)
    close(dense(smoothed), wanted, 1e-12)
    third = jax.tree.map(lambda x: x[3], smoothed)
    entry = np.sqrt(last.dispersion * wanted[1][3][0, 0])
    np.testing.assert_allclose(ff.standard_error(third)["level"], entry, rtol=1e-10)
    assert ff.sample(third, 0, (4,))["slope"].shape == (4, 2)


def test_the_state_before_any_batch():
    """Its belief is the prior, which the data tell of as well."""
    flow = build(ff.memories.random_walk(NOISE, MOVE))
    first, states = start(flow), filtered(flow, BATCHES)
    whole = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, states)
    smoothed = ff.smooth(flow, whole)
    means, covariances = dense(smoothed)
    close((means[1:], covariances[1:]), dense(ff.smooth(flow, states)), 1e-12)
    # theta_0 = A^-1 (theta_1 - noise): regressed on theta_1, whose belief is smoothed
    gain = MOVE.T @ np.linalg.inv(MOVE @ MOVE.T + NOISE)
    left = np.eye(STATES) - gain @ MOVE
    np.testing.assert_allclose(means[0], gain @ means[1], rtol=1e-10)
    wanted = gain @ covariances[1] @ gain.T + left
    np.testing.assert_allclose(covariances[0], wanted, rtol=1e-10)


@pytest.mark.slow
def test_a_refused_update_moves_nothing():
    flow = build(ff.memories.random_walk(NOISE, MOVE))
    step = jax.jit(flow.update)
    state, states = start(flow), []
    spoilt = (np.full_like(LOOKS[0], 1e200), TARGETS[0], WEIGHTS[0])
    for time in range(TIMES):
        state, _ = step(state, tuple(part[time] for part in BATCHES))
        states.append(state)
        if time == 5:
            state, info = step(state, spoilt)
            assert info.skipped
            states.append(state)
    means, covariances = dense(ff.smooth(flow, states))
    kept = [*range(6), *range(7, TIMES + 1)]
    close(
        (means[kept], covariances[kept]),
        dense(ff.smooth(flow, filtered(flow, BATCHES))),
        1e-12,
    )
    close((means[6:7], covariances[6:7]), (means[5:6], covariances[5:6]), 1e-14)


@pytest.mark.parametrize("compensated", [None, False])
@pytest.mark.slow
def test_in_float32_under_jit(compensated):
    flow = build(ff.memories.random_walk(NOISE, MOVE), compensated=compensated)
    wanted = joint([MOVE] * TIMES, [NOISE] * TIMES, MOVE @ MOVE.T + NOISE)

    def smooth(states):
        return ff.smooth(flow, states)

    with jax.enable_x64(False):
        states = filtered(flow, jax.tree.map(jnp.asarray, BATCHES))
        assert states.mean["slope"].dtype == jnp.float32
        found = dense(jax.jit(smooth)(states))
        twice = jax.vmap(smooth)(jax.tree.map(lambda x: jnp.stack([x, x]), states))
        again = dense(jax.tree.map(lambda x: x[1], twice))
    close(found, wanted, 1e-5)
    close(again, found, 1e-6)


@pytest.mark.slow
def test_what_cannot_be_smoothed():
    still = build(ff.memories.stationary())
    batches = BATCHES
    with pytest.raises(ValueError, match=r"nothing moves the parameters.*stationary"):
        ff.smooth(still, filtered(still, batches))
    walk = ff.memories.random_walk(0.1)
    parts = build(walk, structure=ff.structures.diagonal())
    with pytest.raises(ValueError, match=r"covariances between all.*diagonal"):
        ff.smooth(parts, filtered(parts, batches))
    flow = build(walk)
    states = filtered(flow, batches)
    with pytest.raises(ValueError, match=r"leaves \(T, ...\).*shape \(\)"):
        ff.smooth(flow, start(flow))
    every = [jax.tree.map(lambda x, t=t: x[t], states) for t in range(TIMES)]
    assert ff.smooth(flow, tuple(every)).mean["slope"].shape[0] == TIMES
    with pytest.raises(ValueError, match="got none"):
        ff.smooth(flow, [])
    for wrong in (every[::2], every[::-1], [*every, flow.advance(every[-1], steps=3)]):
        with pytest.raises(ValueError, match="after every update, in their order"):
            ff.smooth(flow, wrong)
    short = [jax.tree.map(lambda x, t=t: x[t, : 1 + t % 2], batches) for t in (0, 1)]
    with pytest.raises(ValueError, match="different shapes: pad them"):
        ff.smooth(flow, every[:2], short)
    with pytest.raises(TypeError, match="a flow stands before"):
        ff.smooth(states, flow)
    with pytest.raises(ValueError, match="another flow's"):
        ff.smooth(parts, states)
    broken = states._replace(
        information=jax.tree.map(lambda x: x.at[5].set(-x[5]), states.information)
    )
    with pytest.raises(ValueError, match="covariance of state"):
        ff.smooth(flow, broken)


@pytest.mark.slow
def test_forecasts_cover():
    """The 90 % interval of the next observation, at the true rate of the drift.

    Of 400 streams; that of the state itself, which is of the past, covers less.
    """
    count, times = 400, 40
    memory = ff.memories.random_walk(0.2, MOVE)
    flow = build(memory, prior_is="predicted", num_steps=1)
    model = flow.recipe.apply_fn, flow.recipe.likelihood

    def stream(key):
        start, moves, looks, noise = jax.random.split(key, 4)
        looks = jax.random.normal(looks, (times, ROWS, STATES))
        pushes = np.sqrt(0.2) * jax.random.normal(moves, (times, STATES))

        def move(state, push):
            return MOVE @ state + push, state

        states = jax.lax.scan(move, jax.random.normal(start, (STATES,)), pushes)[1]
        line = jnp.einsum("tri,ti->tr", looks, states)
        return looks, line + SCALE * jax.random.normal(noise, line.shape)

    def one(key):
        def step(state, batch):
            found = []
            for believed in (flow.advance(state), state):
                prediction = ff.predict(believed, *model, batch[0])
                ends = ff.predictions.observation_interval(prediction, model[1], 0.9)
                found.append((batch[1] > ends[0]) & (batch[1] < ends[1]))
            return flow.update(state, batch)[0], jnp.stack(found)

        looks, targets = stream(key)
        first, _ = flow.update(start(flow), (looks[0], targets[0]))
        return jax.lax.scan(step, first, (looks[1:], targets[1:]))[1]

    hits = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count))
    forecast, past = np.mean(hits, (0, 1, 3))
    assert 0.89 < forecast < 0.91  # of 31,200 targets; standard error .002
    assert past < 0.87

"""Dummies that sum to the intercept, under memories that invert what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

NUMBER, ROWS, PRIOR = 24, 9, 1e-6
LEVELS = np.eye(3)[np.arange(ROWS) % 3]
TRAP = np.column_stack([np.ones(ROWS), LEVELS])
NOISE = np.random.default_rng(2).normal(size=(NUMBER, ROWS))


def linear(params, inputs):
    return inputs @ params


def stream(flow, inputs, targets, dtype):
    """The last state and what was said of each update."""
    inputs = np.broadcast_to(inputs, (len(targets), *inputs.shape))
    batches = jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype)
    start = flow.init(jnp.zeros(inputs.shape[-1], dtype))
    return jax.jit(lambda b: jax.lax.scan(flow.update, start, b))(batches)


MOVE = np.diag([1.0, 0.9, 0.9, 0.9]) + 0.1 * np.eye(4, k=1)


@jax.jit
def moved(move, targets):
    """The last state under a transition that is traced, as is the type."""
    memory = ff.memories.random_walk(1e-3, move)
    flow = ff.fisher_flow(
        linear, ff.likelihoods.gaussian(), memory=memory, prior_precision=PRIOR
    )
    start = flow.init(jnp.zeros(4, targets.dtype))
    inputs = jnp.asarray(TRAP, targets.dtype)
    return jax.lax.scan(lambda s, y: flow.update(s, (inputs, y)), start, targets)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("move", [MOVE, np.diag([0.0, 1.0, 1.0, 0.5])])
def test_a_transition_inverts_no_information(move, dtype):
    """Against Kalman's filter in covariance form, in numpy."""
    noise, targets = 1e-3, LEVELS @ [1.0, 2.0, 3.0] + NOISE
    state = moved(move, jnp.asarray(targets, dtype))
    mean, covariance = np.zeros(4), np.eye(4) / PRIOR
    for observed in targets:
        mean, covariance = move @ mean, move @ covariance @ move.T + noise * np.eye(4)
        spread = TRAP @ covariance @ TRAP.T + np.eye(ROWS)
        gain = np.linalg.solve(spread, TRAP @ covariance).T
        mean = mean + gain @ (observed - TRAP @ mean)
        covariance = covariance - gain @ TRAP @ covariance
    cells = TRAP[:3]
    error = np.sqrt(np.diag(cells @ covariance @ cells.T))
    gap = np.abs(cells @ np.asarray(state.mean, float) - cells @ mean) / error
    assert state.num_skipped == 0
    np.testing.assert_array_less(gap, 0.02)


LIKELIHOODS = {
    "known": ff.likelihoods.gaussian(),
    "unknown": ff.likelihoods.gaussian(None),
}
CHANGE = 16
JUMPED = NOISE + 3.0 * (np.arange(NUMBER) >= CHANGE)[:, None]


def alarmed(likelihood, inputs, dtype, robust=False):
    flow = ff.fisher_flow(
        linear,
        LIKELIHOODS[likelihood],
        memory=ff.memories.adaptive(500, size=4, guard=3),
        prior_precision=PRIOR,
        robust=robust,
    )
    return stream(flow, inputs, JUMPED, dtype)


@functools.cache
def without(likelihood, robust):
    """The reference, in float64."""
    return alarmed(likelihood, LEVELS, jnp.float64, robust)


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("likelihood", "robust"), [("known", False), ("unknown", False), ("known", True)]
)
def test_an_alarm_is_that_of_the_model_without_redundant_columns(
    likelihood, robust, dtype
):
    """The statistic, its degrees of freedom, and what is kept after the jump."""
    trap, found = alarmed(likelihood, TRAP, dtype, robust)
    plain, expected = without(likelihood, robust)
    found, expected = found.memory, expected.memory
    assert np.flatnonzero(expected.alarm).tolist() == [CHANGE]
    for name in ("alarm", "change_point"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    # an unknown dispersion is told by the observations less the parameters
    close = 0.06 if likelihood == "unknown" else 1e-3
    np.testing.assert_allclose(found.statistic, expected.statistic, rtol=close)
    tested = ~np.isnan(expected.statistic)
    thresholds = (x.threshold[tested] for x in (found, expected))
    np.testing.assert_allclose(*thresholds, rtol=1e-6)
    cells = TRAP[:3] @ np.asarray(trap.mean)
    np.testing.assert_allclose(cells, plain.mean, atol=1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("rows", "close"), [(1, 2e-2), (20, 1e-2)])
def test_a_window_has_the_dispersion_of_its_rows_in_float32(rows, close):
    """At 1e6, beside dummies that sum to the intercept; against least squares.

    The model's outputs are rounded to a sixteenth, of which ten rows average little.
    """
    rng, number, size, level = np.random.default_rng(3), 60, 10, 1e6
    groups = np.arange(number * rows) % 3
    inputs = np.column_stack([np.ones(number * rows), np.eye(3)[groups]])
    targets = np.float32(level + groups + rng.normal(size=number * rows))
    flow = ff.fisher_flow(
        linear,
        LIKELIHOODS["unknown"],
        memory=ff.memories.windowed(size),
        prior_precision=PRIOR,
    )
    cut = inputs.reshape(number, rows, 4), targets.reshape(number, rows)
    batches = jnp.asarray(cut[0], jnp.float32), jnp.asarray(cut[1])
    start = flow.init(jnp.zeros(4, jnp.float32))
    state, _ = jax.jit(lambda b: jax.lax.scan(flow.update, start, b))(batches)
    last = size * rows
    kept, own = targets[-last:] - level, np.eye(3)[groups[-last:]]
    squares = np.sum(np.square(kept - own @ np.linalg.lstsq(own, kept)[0]))
    np.testing.assert_allclose(state.dispersion, squares / (last - 3), rtol=close)

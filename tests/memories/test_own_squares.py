"""The dispersion and the alarms do not depend on where the targets are centred."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

DECAY, WINDOW = 0.97, 10
MEMORIES = {
    "stationary": ff.memories.stationary(),
    "exponential": ff.memories.exponential(DECAY),
    "unfloored": ff.memories.exponential(DECAY, floor=False),
    "windowed": ff.memories.windowed(WINDOW),
}
_rng = np.random.default_rng(3)
INPUTS = np.column_stack([np.ones(2000), _rng.normal(size=(2000, 3))])
TARGETS = INPUTS @ [1e6, 1.0, 2.0, -1.0] + _rng.normal(size=2000)
BATCHES = INPUTS.reshape(20, 100, 4), TARGETS.reshape(20, 100), np.ones((20, 100))


def linear(params, inputs):
    return inputs @ params


@functools.cache
def compiled(memory, prior_precision=1e-6):
    """A flow, and its pass over stacked batches, compiled once a shape."""
    flow = ff.fisher_flow(
        linear,
        ff.likelihoods.gaussian(scale=None),
        memory=memory,
        prior_precision=prior_precision,
    )
    return flow, jax.jit(functools.partial(jax.lax.scan, flow.update))


def run(memory, batches, dtype, *prior_precision):
    flow, scan = compiled(memory, *prior_precision)
    batches = jax.tree.map(lambda x: jnp.asarray(x, dtype), batches)
    state = flow.init(jnp.zeros(batches[0].shape[-1], dtype))
    state, info = scan(state, batches)
    assert not state.num_skipped
    return flow, state, info


def padded(batches, width):
    """With rows of weight zero, so that batches of other sizes share a program."""
    missing = width - batches[0].shape[1]
    whole = *batches, np.ones(batches[1].shape)
    return [np.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) for x in whole]


def squares_over_spare(inputs, targets, weights):
    root = np.sqrt(weights)
    squares = np.linalg.lstsq(inputs * root[:, None], targets * root)[1][0]
    return squares / (weights.sum() - inputs.shape[1])


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_dispersion_of_a_target_at_a_million(memory, dtype):
    """Under a prior at zero that is a thousand of its deviations away."""
    _, state, _ = run(MEMORIES[memory], BATCHES, dtype)
    age = np.arange(20)[::-1]
    weights = {
        "stationary": np.ones(20),
        "windowed": (age < WINDOW).astype(float),
    }.get(memory, DECAY**age)
    expected = squares_over_spare(INPUTS, TARGETS, np.repeat(weights, 100))
    rtol = 1e-6 if dtype == jnp.float64 else 1e-2
    np.testing.assert_allclose(state.dispersion, expected, rtol=rtol)
    assert state.residual > 100 * state.own_residual  # the prior's share, for evidence


@pytest.mark.slow_cases
@pytest.mark.parametrize("memory", ["stationary", "exponential", "windowed"])
def test_the_cut_of_the_rows_does_not_matter_in_float32(memory):
    """A mean of a million is stored to a sixteenth, half the width of these targets'
    standard error or more: what rounding takes of it is kept beside it."""
    flow, scan = compiled(MEMORIES[memory])
    sizes = (1, 20, 100) if memory == "stationary" else (20, 100)
    for size in sizes:
        for seed in range(4):
            order = np.random.default_rng(seed).permutation(2000)
            rows = INPUTS[order].reshape(-1, size, 4), TARGETS[order].reshape(-1, size)
            rows = rows if size == 1 else padded(rows, 100)
            count = 2000 if size == 1 else 20  # batches at a time
            rows = [np.asarray(x, np.float32) for x in rows]
            found = []
            for dtype in (np.float32, np.float64):
                state = flow.init(np.zeros(4, dtype))
                for at in range(0, len(rows[0]), count):
                    part = [x[at : at + count].astype(dtype) for x in rows]
                    state, _ = scan(state, tuple(part))
                found.append(state)
            narrow, wide = found
            assert narrow.num_skipped == 0
            # the first single rows move the mean by the prior's whole width
            rtol = 2e-2 if size == 1 else 1e-2
            if (memory, size) == ("windowed", 20):
                # outputs near a million are rounded to a sixteenth: of 200 rows that
                # leaves .0065 (the standard deviation of six orders), one way or the
                # other by the order in which a machine sums
                rtol = 4 * 0.0065
            np.testing.assert_allclose(
                narrow.dispersion, wide.dispersion, rtol, err_msg=f"{size} {seed}"
            )
            move = np.asarray(narrow.mean, float) + np.asarray(narrow.rest, float)
            gap = flat_gap(wide, move - np.asarray(wide.mean))
            assert gap < 0.15, (size, seed)


def flat_gap(state, move):
    """A move's length in standard errors, the dispersion being one."""
    return np.sqrt(move @ np.asarray(ff.information.to_dense(state.information)) @ move)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-4), (jnp.float32, 1e-2)])
def test_single_rows(dtype, rtol):
    """The mean crosses the prior's whole width while earlier rows do not hold it yet.

    In float32 it is as coarse there as three of its standard errors.
    """
    batches = INPUTS[:, None], TARGETS[:, None]
    _, state, _ = run(MEMORIES["stationary"], batches, dtype)
    expected = squares_over_spare(INPUTS, TARGETS, np.ones(2000))
    np.testing.assert_allclose(state.dispersion, expected, rtol=rtol)


def test_workers_merge_into_one_machine():
    flow, scan = compiled(MEMORIES["stationary"])
    start, rows = flow.init(jnp.zeros(4)), np.arange(20)[:, None]
    inputs, targets, weights = BATCHES
    # of each worker the batches of the other have weight zero
    shares = [(inputs, targets, weights * (rows % 2 == k)) for k in (0, 1)]
    machine, *workers = (scan(start, share)[0] for share in (BATCHES, *shares))
    merged = ff.merge(workers, start)
    np.testing.assert_allclose(merged.own_residual, machine.own_residual, rtol=1e-6)
    np.testing.assert_allclose(merged.dispersion, machine.dispersion, rtol=1e-6)


def test_refine_renews_both_sums_and_the_evidence():
    """Exact for a linear model, but for rounding: of 1e12 from the prior alone."""
    flow, machine, _ = run(MEMORIES["stationary"], BATCHES, jnp.float64)
    start = flow.init(jnp.zeros(4))
    for state, rtol in ((start, 1e-3), (machine, 1e-6)):
        found = ff.refine(flow, state, tuple(map(jnp.asarray, BATCHES)))
        for name in ("residual", "own_residual", "dispersion", "log_evidence"):
            value, expected = getattr(found, name), getattr(machine, name)
            np.testing.assert_allclose(value, expected, rtol=rtol, err_msg=name)


@pytest.mark.slow_cases
@pytest.mark.parametrize("level", [0.0, 1e6])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_alarms_are_those_of_the_centred_series(dtype, level):
    noise = np.random.default_rng(0).normal(size=1200)
    series = (level + noise + 1.5 * (np.arange(1200) >= 600)).reshape(60, 20)
    batches = np.ones((60, 20, 1)), series
    _, state, info = run(ff.memories.adaptive(2000), batches, dtype)
    assert np.flatnonzero(info.memory.alarm).tolist() == [30]
    assert info.memory.change_point[30] == 30
    since = series[30:].ravel()
    coarse = dtype == jnp.float32 and level  # a sixteenth
    np.testing.assert_allclose(
        state.mean[0], since.mean(), atol=0.13 if coarse else 1e-3
    )
    np.testing.assert_allclose(
        state.dispersion, since.var(ddof=1), rtol=0.05 if coarse else 1e-5
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_window_of_too_low_a_rank_raises_no_alarm(dtype):
    """Two thousand updates of which many have no row of some group."""
    rng = np.random.default_rng(1)
    group = np.minimum(rng.geometric(0.6, size=(2000, 10)) - 1, 3)
    inputs = np.eye(4)[group]
    inputs[..., 0] = 1
    targets = group + rng.normal(size=(2000, 10))
    counts = np.stack([(group == k).sum(1) for k in range(4)])
    assert np.mean(np.any(counts == 0, 0)) > 0.5
    _, state, info = run(ff.memories.adaptive(1e6), (inputs, targets), dtype, 1e-3)
    assert not np.any(info.memory.alarm)
    np.testing.assert_allclose(state.mean, np.arange(4), atol=0.2)


@pytest.mark.slow
def test_longley_in_float32_warns_by_name_in_place_of_a_number():
    """Its condition, of equilibrated columns, is 5e9: the dispersion is at most that of
    the model without the direction that float32 hides."""
    longley = pytest.importorskip("statsmodels.datasets.longley")
    data = longley.load_pandas()
    inputs = np.column_stack([np.ones(16), data.exog.to_numpy(float)])
    batch = inputs[None], data.endog.to_numpy(float)[None], np.ones((1, 16))
    _, state, _ = run(MEMORIES["stationary"], batch, jnp.float32, 1e-8)
    with pytest.warns(ff.DataWarning, match=r"theta\[\d\].*collinear.*no number to"):
        error = ff.standard_error(state)
    assert np.all(np.isnan(error))
    # one direction of seven, along which the estimate came a part of the way
    np.testing.assert_allclose(state.degrees_of_freedom, 16 - 6, rtol=1e-3)
    length = np.linalg.norm(inputs, axis=0)
    basis = np.linalg.svd(inputs / length, full_matrices=False)[0]
    squares = np.sum(batch[1] ** 2) - np.cumsum(np.square(batch[1] @ basis))
    assert squares[6] < float(state.own_residual) < 1.01 * squares[5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.confidence_interval(state)  # said once


@pytest.mark.parametrize("size", [16, 4])
def test_longley_in_raw_units(size):
    """Source: R's lm, as in statsmodels; 92936.006 on 9 degrees of freedom."""
    longley = pytest.importorskip("statsmodels.datasets.longley")
    data = longley.load_pandas()
    inputs = np.column_stack([np.ones(16), data.exog.to_numpy(float)])
    batches = inputs.reshape(-1, size, 7), data.endog.to_numpy(float).reshape(-1, size)
    flow, scan = compiled(MEMORIES["stationary"], 1e-8)
    state = flow.init(jnp.zeros(7))
    for batch in zip(*padded(batches, 16), strict=True):
        state, _ = scan(state, tuple(x[None] for x in batch))
    assert not state.num_skipped
    np.testing.assert_allclose(state.dispersion, 92936.0061673238, rtol=1e-3)
    np.testing.assert_allclose(state.degrees_of_freedom, 9, rtol=1e-3)


@jax.jit
def walk(noise, batches):
    """The flow after a stream; one program for all noises."""
    flow = ff.fisher_flow(
        linear,
        ff.likelihoods.gaussian(scale=None),
        memory=ff.memories.random_walk(noise),
        prior_precision=1e-6,
    )
    return jax.lax.scan(flow.update, flow.init(jnp.zeros(1)), batches)[0]


@pytest.mark.parametrize(("noise", "level"), [(0.01, 1e3), (0.3, 1e3), (0.3, 0.0)])
def test_a_random_walk_has_the_dispersion_of_its_generalised_least_squares(
    noise, level
):
    rng, times = np.random.default_rng(2), np.arange(1, 201)
    series = level + np.cumsum(noise**0.5 * rng.normal(size=200)) + rng.normal(size=200)
    batches = np.ones((200, 1, 1)), series[:, None]
    state = walk(noise, batches)
    assert not state.num_skipped
    root = np.linalg.cholesky(np.eye(200) + noise * np.minimum.outer(times, times))
    white = np.linalg.solve(root, np.column_stack([np.ones(200), series]))
    expected = squares_over_spare(white[:, :1], white[:, 1], np.ones(200))
    np.testing.assert_allclose(state.dispersion, expected, rtol=1e-3)

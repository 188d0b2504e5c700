"""A bad row costs that row: left out and counted, or told where it is at hand."""

import warnings

import jax
import numpy as np
import pytest

import fisherflow_jax as ff
import streams
from fisherflow_jax._ground.screening import Screen

OPTIONS = {"num_steps": 4, "robust": True}


def batch_with(what):
    inputs, labels = streams.INPUTS[:8].copy(), streams.LABELS[:8].copy()
    weights = np.ones(8)
    if what == "nan input":
        inputs[3, 1] = np.nan
    elif what == "infinite input":
        inputs[0, 0] = np.inf
    elif what == "nan target":
        labels[7] = np.nan
    elif what == "impossible target":
        labels[2] = 2.0
    elif what == "negative weight":
        weights[1] = -1.0
    elif what == "nan weight":
        weights[1] = np.nan
    return inputs, labels, weights


# of each kind the row, and what an error says of it
KINDS = {
    "nan input": (3, r"inputs\[3, 1\] = nan, which is not finite"),
    "infinite input": (0, r"inputs\[0, 0\] = inf, which is not finite"),
    "nan target": (7, r"targets\[7\] = nan, which is not finite"),
    "impossible target": (2, r"targets\[2\] = 2.0, which bernoulli cannot produce"),
    "negative weight": (1, r"weights\[1\] = -1.0, which is no multiplicity"),
    "nan weight": (1, r"weights\[1\] = nan, which is no multiplicity"),
}


def logistic(memory="exponential", **options):
    return streams.flow("full", memory, "bernoulli", **OPTIONS, **options)


def without(row):
    """The batch of no kind, the row at weight 0."""
    inputs, labels, weights = batch_with("nothing")
    weights[row] = 0
    return inputs, labels, weights


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(logistic().update)


@pytest.mark.parametrize("kind", KINDS)
def test_under_jit_a_bad_row_has_weight_zero_and_is_counted(compiled, kind):
    good = streams.batches(8, "bernoulli", np.ones(24))
    state, _ = compiled(streams.start(logistic()), good[0])
    after, info = compiled(state, batch_with(kind))
    assert not info.skipped and not info.missing and info.rows_skipped == 1
    assert (after.num_skipped, after.events.rows_skipped) == (0, 1)
    expected, _ = compiled(state, without(KINDS[kind][0]))
    assert expected.events.rows_skipped == 0  # padding is no bad row
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12),
        after._replace(events=None),
        expected._replace(events=None),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_eager_it_is_an_error_that_names_row_and_field(kind):
    flow = logistic()
    row, message = KINDS[kind]
    with pytest.raises(ValueError, match=f"row {row} of the batch has {message}"):
        flow.update(streams.start(flow), batch_with(kind))


def test_eager_rows_are_dropped_where_that_is_asked_for(compiled):
    dropping, start = logistic(bad_rows="drop"), streams.start(logistic())
    for kind, (row, _) in KINDS.items():
        after, info = dropping.update(start, batch_with(kind))
        assert info.rows_skipped == after.events.rows_skipped == 1
        expected, _ = compiled(start, without(row))
        np.testing.assert_allclose(
            streams.flat(after.mean), streams.flat(expected.mean), rtol=1e-10
        )
    with pytest.raises(ValueError, match=r"bad_rows is .raise. .* got 'skip'"):
        logistic(bad_rows="skip")


# adaptive and random_walk move the belief, with no batch too: the clock
@pytest.mark.slow_cases
@pytest.mark.parametrize("memory", streams.MEMORIES)
def test_a_batch_of_bad_rows_alone_is_a_missing_observation(memory):
    flow = streams.flow("full", memory)
    flow = flow._replace(update=jax.jit(flow.update))
    state = streams.run(flow, streams.start(flow), streams.batches(4)[:2])[-1]
    inputs, targets, weights = streams.batches(4)[2]
    after, info = flow.update(state, (inputs, targets * np.nan, weights))
    assert info.missing and not info.skipped
    assert after.events.rows_skipped == np.sum(weights > 0)
    expected, _ = flow.update(state, (inputs, targets, 0 * weights))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12),
        after._replace(events=None),
        expected._replace(events=None),
    )
    assert after.step == 3


@pytest.mark.slow
def test_of_a_model_whose_examples_interact_the_update_is_refused_and_counted():
    def centred(params, x):
        return streams.linear(params, x - x.mean(0))

    flow = ff.fisher_flow(centred, ff.likelihoods.bernoulli(), bad_rows="drop")
    start = flow.init(streams.tree(np.zeros(3)))
    after, info = jax.jit(flow.update)(start, batch_with("impossible target"))
    assert info.skipped and info.rows_skipped == 0
    assert (after.num_skipped, after.events.rows_skipped) == (1, 0)
    np.testing.assert_array_equal(streams.flat(after.mean), np.zeros(3))
    # no row can be left out, so that asking for it does not help
    with pytest.raises(ValueError, match=r"row 2 .*examples interact.*mend the row"):
        flow.update(start, batch_with("impossible target"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)]
)
def test_one_bad_target_in_each_batch_of_a_hundred(dtype):
    """As the stream with these rows at weight 0, and as least squares without them.

    By a scan, and by an eager loop that is asked to drop them.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + rng.normal(size=2000)
    bad = 100 * np.arange(20) + rng.integers(0, 100, 20)
    weights, spoilt = np.ones(2000), y.copy()
    weights[bad], spoilt[bad] = 0, np.nan
    flow = ff.fisher_flow(
        lambda w, x: x @ w,
        ff.likelihoods.gaussian(None),
        prior_precision=1e-9,
        bad_rows="drop",
    )
    start = flow.init(np.zeros(3, dtype))

    def cut(*parts):
        shaped = (part.reshape((20, 100, *part.shape[1:])) for part in parts)
        return tuple(part.astype(dtype) for part in shaped)

    stream = jax.jit(lambda batches: jax.lax.scan(flow.update, start, batches)[0])
    batches = cut(x, spoilt, np.ones(2000))
    dropped, weighted, eager = stream(batches), stream(cut(x, y, weights)), start
    for batch in zip(*batches, strict=True):
        eager, info = flow.update(eager, batch)
        assert (info.rows_skipped, bool(info.skipped)) == (1, False)
    narrow = dtype == np.float32
    for state in (dropped, eager):
        assert state.events.rows_skipped == 20 and state.num_skipped == 0
        assert state.count == weighted.count == 1980
        for name in ("mean", "dispersion", "log_evidence"):
            left, right = getattr(state, name), getattr(weighted, name)
            np.testing.assert_allclose(left, right, rtol=1e-5 if narrow else 1e-10)
    keep, rtol = weights > 0, 1e-5 if narrow else 1e-8
    best, squares, *_ = np.linalg.lstsq(x[keep], y[keep], rcond=None)
    np.testing.assert_allclose(dropped.mean, best, rtol=rtol)
    np.testing.assert_allclose(dropped.dispersion, squares[0] / 1977, rtol=rtol)


@pytest.mark.slow
def test_a_channel_that_is_missing_costs_that_channel():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 2))
    y = x @ rng.normal(size=(2, 3)) + rng.normal(size=(40, 3))
    seen = rng.random((40, 3)) > 0.3
    seen[5] = False  # and of one row all
    flow = ff.fisher_flow(
        lambda w, x: x @ w, ff.likelihoods.gaussian(), prior_precision=1e-9
    )
    start = flow.init(np.zeros((2, 3)))
    state, info = jax.jit(flow.update)(start, (x, np.where(seen, y, np.nan)))
    assert info.rows_skipped == np.sum(~seen.all(1))
    assert state.count == np.sum(seen.any(1))  # an example is the observation
    targets, _ = flow.update(start, (x, np.where(seen, y, 7.0), seen))
    assert targets.count == seen.sum()
    for j in range(3):
        best = np.linalg.lstsq(x[seen[:, j]], y[seen[:, j], j], rcond=None)[0]
        np.testing.assert_allclose(state.mean[:, j], best, rtol=1e-7)
        np.testing.assert_allclose(targets.mean[:, j], best, rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_of_another_coding_are_counted(dtype):
    """-1 and 1 in place of 0 and 1: each row of -1 is lost; state and table say so."""
    flow = ff.fisher_flow(lambda w, x: x @ w, ff.likelihoods.bernoulli())
    x, labels = np.arange(24.0).reshape((3, 8, 1)) / 24, 2 * streams.LABELS - 1
    batches = x.astype(dtype), labels.reshape((3, 8)).astype(dtype)
    start = flow.init(np.zeros(1, dtype))
    with jax.enable_x64(dtype == np.float64):
        state, _ = jax.jit(lambda b: jax.lax.scan(flow.update, start, b))(batches)
    lost = np.sum(labels < 0)
    assert state.events.rows_skipped == lost and state.num_skipped == 0
    assert state.count == 24 - lost
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ff.DataWarning)  # of the prior's share
        table = str(ff.summary(state))
    assert f"rows skipped: {lost}" in table


def test_an_overflow_that_no_check_foresees_is_caught_too(compiled):
    """All values are finite and possible; their product is not."""
    flow = logistic()
    inputs, labels, weights = batch_with("nothing")
    inputs[0] = 1e200  # its square is beyond float64
    with pytest.raises(ValueError, match="is not finite"):
        flow.update(streams.start(flow), (inputs, labels, weights))
    after, info = compiled(streams.start(flow), (inputs, labels, weights))
    assert info.skipped and after.num_skipped == 1


def log_rate(params, inputs):
    x, exposure = inputs
    return x * params + jax.numpy.log(exposure)


def test_a_row_of_which_the_model_makes_what_is_not_finite_is_named():
    flow = ff.fisher_flow(log_rate, ff.likelihoods.poisson(), num_steps=1)
    x, exposure, counts = np.ones(4), np.array([1.0, 0, 3, 0]), np.arange(4.0)
    start, inputs = flow.init(np.zeros(())), (x, exposure)
    message = (
        r"row 1 of the batch \(2 in all\) has finite inputs, .*by its outputs, -inf, .*"
    )
    with pytest.raises(ValueError, match=message + "exposure of 0.*weight 0"):
        flow.update(start, (inputs, counts, np.ones(4)))
    # no time, no count: such a row says nothing, and neither does one of weight 0
    counts[1] = 0.0
    after, _ = flow.update(start, (inputs, counts, np.array([1.0, 1.0, 1.0, 0.0])))
    alone, _ = flow.update(start, (inputs, counts, np.array([1.0, 0.0, 1.0, 0.0])))
    assert after.mean == alone.mean and after.count == alone.count + 1


def test_only_targets_that_count_are_named():
    values = np.zeros((3, 2))
    values[0, 1], values[1, 0] = -np.inf, np.nan
    batch, screen = ff.Batch(None, None, np.ones((3, 2))), Screen()
    named = lambda batch: screen.refuse_made(batch, (values, values), "it")  # noqa: E731
    for counts, row in (([[1, 0], [1, 1], [1, 1]], 1), ([[1, 1], [0, 1], [1, 1]], 0)):
        for kept in (
            batch._replace(weights=np.array(counts, float)),
            batch._replace(weights=np.ones(3), mask=np.array(counts, bool)),
        ):
            with pytest.raises(ValueError, match=rf"row {row} of it \(1 in all\)"):
                named(kept)
    named(batch._replace(weights=np.array([0.0, 0.0, 1.0])))
    named(batch._replace(weights=np.array([[1.0, 0], [0, 1], [1, 1]])))


def test_a_stream_survives_its_bad_batches():
    flow = streams.flow("diagonal", "windowed", "bernoulli")
    good = streams.batches(8, "bernoulli", np.ones(24))
    stream = [
        good[0],
        batch_with("nan input"),
        good[1],
        batch_with("nan target"),
        good[2],
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *stream)
    stacked[0][1, 0] = 1e200  # its square is beyond float64
    stacked[0][3, 0] = 1e200
    state, info = jax.lax.scan(flow.update, streams.start(flow), stacked)
    np.testing.assert_array_equal(info.skipped, [False, True, False, True, False])
    np.testing.assert_array_equal(info.rows_skipped, [0, 1, 0, 1, 0])
    expected = streams.run(flow, streams.start(flow), good)[-1]
    np.testing.assert_allclose(streams.flat(state.mean), streams.flat(expected.mean))
    assert state.num_skipped == 2 and state.step == 3
    assert np.isfinite(state.log_evidence)


def test_separable_data_stays_finite():
    """The maximum likelihood is at infinity; the prior holds the estimate."""
    flow = streams.flow("full", "stationary", "bernoulli", num_steps=4)
    labels = (streams.INPUTS[:, 0] > 0).astype(float)
    batch = (streams.INPUTS[:8] * 100, labels[:8], np.ones(8))
    state = streams.start(flow)
    for _ in range(30):
        state, info = flow.update(state, batch)
        assert not info.skipped
    assert np.isfinite(streams.flat(state.mean)).all()
    assert np.isfinite(streams.flat(ff.standard_error(state))).all()


@pytest.mark.parametrize("marginal", [False, True])
def test_duplicated_features_stay_finite(marginal):
    """The data's information is singular: the prior fills the gap."""
    structure = "diagonal" if marginal else "full"
    flow = streams.flow(structure, "stationary", num_steps=1, marginal=marginal)
    inputs = streams.INPUTS[:, [0, 1, 1]]
    state = streams.start(flow)
    for cut in (slice(0, 8), slice(8, 16), slice(16, 24)):
        state, info = flow.update(
            state, (inputs[cut], streams.TARGETS[cut], np.ones(8))
        )
        assert not info.skipped
    error = streams.flat(ff.standard_error(state))
    assert np.isfinite(streams.flat(state.mean)).all() and np.isfinite(error).all()
    # each of the twins is uncertain, one alone by about the prior's deviation
    assert (error[1:] > 0.5 / np.sqrt(streams.PRECISION)).all()
    if not marginal:
        information = (
            streams.PRECISION * np.eye(3) + inputs.T @ inputs / streams.SCALE**2
        )
        expected = np.sqrt(np.diag(np.linalg.inv(information)))
        np.testing.assert_allclose(error, expected)

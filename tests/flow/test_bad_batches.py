"""A batch with a value that cannot be: an error eager, a counted event under jit."""

import jax
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

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


KINDS = [
    "nan input",
    "infinite input",
    "nan target",
    "impossible target",
    "negative weight",
    "nan weight",
]


def logistic(memory="exponential"):
    return streams.flow("full", memory, "bernoulli", **OPTIONS)


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(logistic().update)


@pytest.mark.parametrize("kind", KINDS)
def test_under_jit_nothing_moves_and_it_is_counted(compiled, kind):
    good = streams.batches(8, "bernoulli", np.ones(24))
    state, _ = compiled(streams.start(logistic()), good[0])
    after, info = compiled(state, batch_with(kind))
    assert info.skipped and info.log_evidence == 0
    assert after.num_skipped == 1
    jax.tree.map(
        np.testing.assert_array_equal, after._replace(num_skipped=0 * state.step), state
    )
    # later batches go on as if it had never come
    expected, _ = compiled(state, good[1])
    later, info = compiled(after, good[1])
    assert not info.skipped and later.num_skipped == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        later._replace(num_skipped=0 * state.step),
        expected,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_eager_it_is_an_error(kind):
    flow = logistic()
    message = {
        "impossible target": "targets that bernoulli cannot produce",
        "negative weight": "weights must be finite and not negative",
        "nan weight": "weights must be finite and not negative",
    }.get(kind, "a NaN or an infinite value in a row of positive weight")
    with pytest.raises(ValueError, match=message):
        flow.update(streams.start(flow), batch_with(kind))


def test_a_first_batch_that_is_refused_leaves_the_start_of_the_search(compiled):
    start = streams.start(logistic())
    after, info = compiled(start, batch_with("nan input"))
    assert info.skipped
    np.testing.assert_array_equal(streams.flat(after.mean), np.zeros(3))
    expected, _ = compiled(start, streams.batches(8, "bernoulli")[0])
    later, _ = compiled(after, streams.batches(8, "bernoulli")[0])
    np.testing.assert_array_equal(streams.flat(later.mean), streams.flat(expected.mean))


def test_an_overflow_that_no_check_foresees_is_caught_too(compiled):
    """All values are finite and possible; their product is not."""
    flow = logistic()
    inputs, labels, weights = batch_with("nothing")
    inputs[0] = 1e200  # its square is beyond float64
    with pytest.raises(ValueError, match="is not finite"):
        flow.update(streams.start(flow), (inputs, labels, weights))
    after, info = compiled(streams.start(flow), (inputs, labels, weights))
    assert info.skipped and after.num_skipped == 1


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
    state, info = jax.lax.scan(flow.update, streams.start(flow), stacked)
    np.testing.assert_array_equal(info.skipped, [False, True, False, True, False])
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

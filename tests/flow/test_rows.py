"""Padding, multiplicities and missing observations."""

import chex
import jax
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

STEPS = {"num_steps": 4, "robust": True}


def logistic():
    return streams.flow("full", "exponential", "bernoulli", **STEPS)


def assert_same(state, expected, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **tolerance), state, expected
    )


@pytest.mark.slow
def test_padding_may_hold_anything_and_changes_nothing():
    flow, start = logistic(), streams.start(logistic())
    inputs, labels = streams.INPUTS[:8].copy(), streams.LABELS[:8].copy()
    weights = np.array([1.0, 2, 1, 1, 3, 0, 0, 0])
    padded = {}
    for filling in (np.nan, np.inf, 0.0, -1e300):
        inputs[5:], labels[5:] = filling, filling
        state, info = flow.update(start, (inputs, labels, weights))
        assert not info.skipped and not info.missing
        padded[filling] = state, info
    for filling in (np.inf, 0.0, -1e300):
        chex.assert_trees_all_equal(padded[np.nan], padded[filling])
    short = flow.update(start, (inputs[:5], labels[:5], weights[:5]))
    assert_same(padded[np.nan], short, rtol=1e-13)


def test_padding_may_come_first():
    flow, start = logistic(), streams.start(logistic())
    inputs, labels = streams.INPUTS[:8].copy(), streams.LABELS[:8].copy()
    inputs[:3], labels[:3] = np.nan, 7.0
    weights = np.array([0.0, 0, 0, 1, 1, 1, 1, 1])
    last_first = flow.update(start, (inputs[::-1], labels[::-1], weights[::-1]))
    assert_same(
        flow.update(start, (inputs, labels, weights)),
        last_first,
        rtol=1e-12,
        atol=1e-14,
    )


def test_weights_are_multiplicities():
    flow, start = logistic(), streams.start(logistic())
    often = np.array([2, 1, 0, 3, 1, 0, 0, 1])
    inputs, labels = streams.INPUTS[:8], streams.LABELS[:8]
    weighted = flow.update(start, (inputs, labels, often.astype(float)))
    repeated = flow.update(
        start, (np.repeat(inputs, often, 0), np.repeat(labels, often, 0), np.ones(8))
    )
    assert_same(weighted, repeated, rtol=1e-11, atol=1e-13)
    # whole-number weights will do, by name
    whole = flow.update(start, ff.Batch(inputs, labels, often))
    chex.assert_trees_all_equal(whole, weighted)


def test_weights_left_out_are_ones():
    flow, start = logistic(), streams.start(logistic())
    batch = streams.INPUTS[:8], streams.LABELS[:8]
    jax.tree.map(
        np.testing.assert_array_equal,
        flow.update(start, batch),
        flow.update(start, (*batch, np.ones(8))),
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("memory", "likelihood"),
    [("exponential", "bernoulli"), ("windowed", "unknown"), ("exponential", "unknown")],
)
def test_all_zero_weights_are_a_missing_observation(memory, likelihood):
    options = STEPS if likelihood == "bernoulli" else {}
    flow = streams.flow("full", memory, likelihood, **options)
    batches = streams.batches(8, likelihood, np.ones(24))
    seen = streams.run(flow, streams.start(flow), batches[:2])[-1]
    inputs, targets, _ = batches[2]
    after, info = flow.update(seen, (inputs, targets, np.zeros(8)))
    assert info.missing and not info.skipped
    assert info.log_evidence == pytest.approx(0, abs=1e-12)
    assert after.step == seen.step + 1 and after.num_skipped == 0
    # the memory moves on and nothing is added
    if memory == "exponential":
        kept = streams.DECAY
        prior = streams.PRECISION * np.eye(3)
        before = streams.dense(seen.information)
        expected = kept * before + (1 - kept) * prior
        np.testing.assert_allclose(after.count, kept * seen.count)
        moment = kept * before @ (streams.flat(seen.mean) - streams.ORIGIN)
    else:  # the window still holds both batches
        expected = streams.dense(seen.information)
        np.testing.assert_allclose(after.count, seen.count)
        moment = expected @ (streams.flat(seen.mean) - streams.ORIGIN)
    np.testing.assert_allclose(streams.dense(after.information), expected, rtol=1e-9)
    mean = streams.ORIGIN + np.linalg.solve(expected, moment)
    np.testing.assert_allclose(streams.flat(after.mean), mean, rtol=1e-9)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "likelihood",
    [
        ff.likelihoods.gamma(),
        ff.likelihoods.poisson(),
        ff.likelihoods.categorical(),
    ],
    ids=lambda likelihood: likelihood.name,
)
def test_a_missing_first_batch_leaves_the_prior_in_every_family(likelihood):
    """No filling of the padding may be an impossible target of the family."""

    def apply_fn(params, inputs):
        line = inputs @ params
        return line[:, None] * np.arange(3.0) if classes else line

    classes = likelihood.name == "categorical"
    flow = ff.fisher_flow(
        apply_fn,
        likelihood,
        structure=ff.structures.diagonal(),
        memory=ff.memories.stationary(),
        num_steps=2,
        robust=True,
    )
    targets = np.full(4, -1) if classes else np.full(4, np.nan)
    batch = (np.full((4, 2), np.nan), targets, np.zeros(4))
    state, info = flow.update(flow.init(np.ones(2), np.zeros(2)), batch)
    assert info.missing and not info.skipped
    np.testing.assert_array_equal(state.mean, np.zeros(2))
    np.testing.assert_array_equal(state.information.entries, np.ones(2))
    np.testing.assert_array_equal(state.meat.entries, np.zeros(2))
    assert state.count == 0 and state.log_evidence == 0


def test_a_ready_batch_is_checked_and_blanked_like_a_tuple():
    flow, start = logistic(), streams.start(logistic())
    inputs, labels = streams.INPUTS[:8].copy(), streams.LABELS[:8].copy()
    inputs[5:], weights = np.nan, np.array([1.0, 2, 1, 1, 3, 0, 0, 0])
    jax.tree.map(
        np.testing.assert_array_equal,
        flow.update(start, ff.Batch(inputs, labels, weights)),
        flow.update(start, (inputs, labels, weights)),
    )
    with pytest.raises(ValueError, match=r"row 0 .*weights\[0\] = -1.0"):
        flow.update(start, ff.Batch(inputs, labels, -weights))

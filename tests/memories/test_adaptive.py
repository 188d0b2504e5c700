"""The adaptive memory: its statistic, its alarm, and what it keeps after one."""

import functools

import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
import streams

SIZE, GUARD, RUN_LENGTH, CHANGE = 4, 3, 100.0, 9
ROWS = 8  # a batch, more than 2 d
_rng = np.random.default_rng(5)
INPUTS = _rng.normal(size=(14 * ROWS, 3))
_noise = streams.SCALE * _rng.normal(size=14 * ROWS)
_before = np.arange(14 * ROWS) < CHANGE * ROWS
TARGETS = np.where(_before, INPUTS @ [1.0, 0.0, -1.0], INPUTS @ [2.0, 1.0, -1.0])
TARGETS = TARGETS + _noise


def batch_of(index):
    rows = slice(index * ROWS, (index + 1) * ROWS)
    return INPUTS[rows], TARGETS[rows]


@functools.cache
def run(likelihood, robust=False):
    flow = ff.fisher_flow(
        streams.linear,
        streams.LIKELIHOODS[likelihood][0],
        structure=ff.structures.full(),
        memory=ff.memories.adaptive(RUN_LENGTH, size=SIZE, guard=GUARD),
        prior_precision=streams.PRECISION,
        num_steps=1,
        robust=robust,
    )
    state, results = streams.start(flow), []
    for index in range(14):
        state, info = flow.update(state, batch_of(index))
        results.append((state, info))
    return results


def least_squares(first, last, prior, scale):
    """Batches first..last (and the prior): estimate, information, penalised squares."""
    rows = slice(first * ROWS, (last + 1) * ROWS)
    inputs, targets = INPUTS[rows], TARGETS[rows]
    precision = prior * streams.PRECISION * np.eye(3)
    information = precision + inputs.T @ inputs / scale**2
    shift = precision @ streams.ORIGIN + inputs.T @ targets / scale**2
    mean = np.linalg.solve(information, shift)
    offset = mean - streams.ORIGIN
    squares = np.sum((targets - inputs @ mean) ** 2) + offset @ precision @ offset
    return mean, information, squares


def wald(width, last, segment, likelihood):
    """The two-sample statistic of the newest `width` batches against the rest."""
    scale = streams.SCALE if likelihood == "gaussian" else 1.0
    new, new_information, _ = least_squares(last - width + 1, last, 0, scale)
    old, old_information, _ = least_squares(segment, last - width, 1, scale)
    spread = np.linalg.inv(new_information) + np.linalg.inv(old_information)
    value = (new - old) @ np.linalg.solve(spread, new - old)
    if likelihood == "gaussian":
        return value
    mean, _, squares = least_squares(segment, last, 1, scale)
    squares -= streams.PRECISION * np.sum((mean - streams.ORIGIN) ** 2)  # its own
    return value * ((last - segment + 1) * ROWS - 3) / squares


def sandwich_wald(width, last, meat):
    new, new_information, _ = least_squares(last - width + 1, last, 0, streams.SCALE)
    old, old_information, _ = least_squares(0, last - width, 1, streams.SCALE)
    share = width / (last + 1)
    covariance = np.zeros((3, 3))
    for information, part in ((new_information, share), (old_information, 1 - share)):
        inverse = np.linalg.inv(information)
        covariance += part * inverse @ meat @ inverse
    return (new - old) @ np.linalg.solve(covariance, new - old)


@pytest.mark.slow_cases
@pytest.mark.parametrize("likelihood", ["gaussian", "unknown"])
def test_the_statistic_is_the_largest_two_sample_wald_statistic(likelihood):
    for last, (_, info) in enumerate(run(likelihood)):
        widths = [w for w in (1, 2, 4) if w <= last + 1 - GUARD]
        expected = max((wald(w, last, 0, likelihood) for w in widths), default=np.nan)
        np.testing.assert_allclose(info.memory.statistic, expected, rtol=1e-9)
        if info.memory.alarm:
            break


def test_an_alarm_is_a_statistic_above_the_quantile_and_names_the_change():
    threshold = stats.chi2.isf(0.25 / RUN_LENGTH, 3)
    alarms = 0
    for _, info in run("gaussian"):
        assert bool(info.memory.alarm) == (info.memory.statistic > threshold)
        assert (info.memory.change_point == -1) == (not info.memory.alarm)
        if info.memory.alarm:
            alarms += 1
            assert info.memory.change_point == CHANGE
    assert alarms == 1


@pytest.mark.parametrize("likelihood", ["gaussian", "unknown"])
def test_after_an_alarm_the_belief_is_the_fit_since_the_change(likelihood):
    scale = streams.SCALE if likelihood == "gaussian" else 1.0
    segment = 0
    for last, (state, info) in enumerate(run(likelihood)):
        if info.memory.alarm:
            segment = int(info.memory.change_point)
        mean, information, squares = least_squares(segment, last, 1, scale)
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-9)
        np.testing.assert_allclose(
            streams.dense(state.information), information, rtol=1e-9, atol=1e-9
        )
        assert state.count == (last - segment + 1) * ROWS
        if likelihood == "unknown":
            np.testing.assert_allclose(state.residual, squares, rtol=1e-9)
    assert segment == CHANGE


def test_robust_statistics_and_the_meat_that_is_kept():
    states = [state for state, _ in run("gaussian", robust=True)]
    infos = [info for _, info in run("gaussian", robust=True)]
    alarm = next(i for i, info in enumerate(infos) if info.memory.alarm)
    # before any cut, of window and rest: sandwiches with shares of one middle
    for last in range(GUARD, alarm):
        widths = [w for w in (1, 2, 4) if w <= last + 1 - GUARD]
        meat = streams.dense(states[last].meat)
        expected = max(sandwich_wald(w, last, meat) for w in widths)
        np.testing.assert_allclose(infos[last].memory.statistic, expected, rtol=1e-9)
    spread = np.zeros((3, 3))
    for index in range(CHANGE, 14):
        inputs, targets = batch_of(index)
        errors = targets - inputs @ streams.flat(states[index - 1].mean)
        scores = inputs * errors[:, None] / streams.SCALE**2
        spread += scores.T @ scores
        if index >= alarm:
            np.testing.assert_allclose(streams.dense(states[index].meat), spread)


def test_after_an_alarm_the_guard_counts_from_the_change():
    results = run("gaussian")
    alarm = next(i for i, (_, info) in enumerate(results) if info.memory.alarm)
    for last in range(alarm + 1, 14):
        length = last - CHANGE + 1
        widths = [w for w in (1, 2, 4) if w <= length - GUARD]
        values = [wald(w, last, CHANGE, "gaussian") for w in widths]
        expected = max(values, default=np.nan)
        np.testing.assert_allclose(
            results[last][1].memory.statistic, expected, rtol=1e-9
        )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1.0,), {}, "average_run_length must be above 1"),
        ((float("nan"),), {}, "average_run_length must be above 1"),
        ((500,), {"size": 0}, "size must be a positive whole number"),
        ((500,), {"size": 2.5}, "size must be a positive whole number"),
        ((500,), {"guard": -1}, "guard must be a whole number, at least 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ff.memories.adaptive(*arguments, **options)

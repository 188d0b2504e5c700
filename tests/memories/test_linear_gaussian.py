"""Linear-Gaussian, every memory is a weighted least squares fit, to 1e-10."""

import numpy as np
import pytest

import streams

CASES = [
    ("stationary", {}),
    ("stationary", {"num_steps": 4}),
    ("stationary", {"compensated": True}),
    ("exponential", {}),
    ("exponential", {"num_steps": 4}),
    ("exponential", {"compensated": True}),
    ("unfloored", {}),
    ("windowed", {}),
    ("windowed", {"num_steps": 4}),
    ("windowed", {"compensated": True}),
    ("adaptive", {}),
]
every_case = pytest.mark.parametrize(
    ("memory", "options"), CASES, ids=[f"{m}-{'-'.join(o)}" for m, o in CASES]
)


def states_of(memory, options):
    return streams.history(memory, robust=True, **options)


@pytest.mark.slow_cases
@every_case
def test_mean_and_information_are_those_of_the_weighted_batch(memory, options):
    for time, state in enumerate(states_of(memory, options)):
        mean, information = streams.fit(memory, time)
        np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
        np.testing.assert_allclose(
            streams.dense(state.information), information, rtol=1e-10, atol=1e-10
        )


@pytest.mark.slow_cases
@every_case
def test_the_count_is_the_remembered_weight(memory, options):
    sums = streams.WEIGHTS.reshape(-1, 4).sum(1)
    for time, state in enumerate(states_of(memory, options)):
        faded = streams.memory_weights(memory, time, time)[1]
        np.testing.assert_allclose(state.count, faded @ sums[: time + 1], rtol=1e-12)
        assert state.step == time + 1


@every_case
def test_log_evidence_is_the_sum_of_the_predictive_densities(memory, options):
    total = 0.0
    for time, state in enumerate(states_of(memory, options)):
        rows = slice(4 * time, 4 * time + 4)
        total += streams.predictive(*streams.predict(memory, time), rows)
        np.testing.assert_allclose(state.log_evidence, total, rtol=1e-10)


@every_case
def test_the_meat_is_the_sum_of_squared_scores(memory, options):
    spreads = []
    for time, state in enumerate(states_of(memory, options)):
        rows = slice(4 * time, 4 * time + 4)
        # before any data there is no estimate: the first scores are at the solution
        at = streams.predict(memory, time)[0] if time else streams.fit(memory, 0)[0]
        inputs = streams.INPUTS[rows]
        errors = (streams.TARGETS[rows] - inputs @ at) / streams.SCALE**2
        scores = inputs * errors[:, None]
        spreads.append((scores.T * streams.WEIGHTS[rows]) @ scores)
        # an outer product of scores carries the memory's weight twice
        faded = streams.memory_weights(memory, time, time)[1] ** 2
        expected = np.tensordot(faded, np.stack(spreads), 1)
        np.testing.assert_allclose(
            streams.dense(state.meat), expected, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("size", [1, 24])
def test_stationary_gives_the_same_in_any_batch_size(size):
    flow = streams.flow()
    state = streams.run(flow, streams.start(flow), streams.batches(size))[-1]
    mean, information = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
    np.testing.assert_allclose(
        streams.dense(state.information), information, rtol=1e-10
    )
    rows = slice(0, 24)
    prior = streams.ORIGIN, streams.PRECISION * np.eye(3)
    evidence = streams.predictive(*prior, rows)
    np.testing.assert_allclose(state.log_evidence, evidence, rtol=1e-10)


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]])
def test_stationary_gives_the_same_in_any_order(order):
    flow, batches = streams.flow(), streams.batches()
    state = streams.run(flow, streams.start(flow), [batches[i] for i in order])[-1]
    expected = streams.run(flow, streams.start(flow), batches)[-1]
    for name in ("mean", "information", "log_evidence", "count"):
        np.testing.assert_allclose(
            *(np.ravel(_numbers(getattr(s, name))) for s in (state, expected)),
            rtol=1e-11,
        )


def _numbers(value):
    if isinstance(value, dict):
        return streams.flat(value)
    return value if hasattr(value, "shape") else streams.dense(value)


def test_adaptive_without_an_alarm_is_stationary():
    for state, expected in zip(
        states_of("adaptive", {}), states_of("stationary", {}), strict=True
    ):
        for name in ("mean", "information", "meat", "log_evidence", "count"):
            np.testing.assert_array_equal(
                *(_numbers(getattr(s, name)) for s in (state, expected))
            )

"""Merging in the structures that keep less than the whole information."""

import numpy as np
import pytest

import fisherflow_jax as ff
import streams

pytestmark = pytest.mark.usefixtures("strict_promotion")


def work(structure):
    flow = streams.flow(structure, "stationary")
    batches = streams.batches(4)
    start = streams.run(flow, streams.start(flow), batches[:2])[-1]
    return start, [streams.run(flow, start, [batch])[-1] for batch in batches[2:]]


@pytest.mark.parametrize("structure", ["scalar", "diagonal", "units", "block"])
def test_informations_and_their_means_add_in_the_structure(structure):
    start, workers = work(structure)
    merged = ff.merge(workers, start)
    common = streams.dense(start.information)
    information, moment = common.copy(), common @ streams.flat(start.mean)
    for worker in workers:
        own = streams.dense(worker.information)
        information += own - common
        moment += own @ streams.flat(worker.mean) - common @ streams.flat(start.mean)
    np.testing.assert_allclose(
        streams.dense(merged.information), information, rtol=1e-12
    )
    np.testing.assert_allclose(
        streams.flat(merged.mean), np.linalg.solve(information, moment), rtol=1e-11
    )
    assert merged.count == streams.WEIGHTS.sum()


def test_low_rank_keeps_its_rank_its_trace_and_its_sign():
    start, workers = work("low_rank")
    merged = ff.merge(workers, start)
    assert type(merged.information) is type(start.information)
    for name, shape in (("level", (1,)), ("slope", (1, 2))):
        assert merged.information.factors[name].shape == shape
    information = streams.dense(merged.information)
    assert np.linalg.eigvalsh(information).min() >= streams.PRECISION * (1 - 1e-12)
    common = streams.dense(start.information)
    summed = common + sum(streams.dense(w.information) - common for w in workers)
    # the recompression keeps the diagonal, unless it had to be kept positive
    np.testing.assert_allclose(np.diag(information), np.diag(summed), rtol=0.05)
    assert np.linalg.norm(information - summed) < 0.3 * np.linalg.norm(summed)


def test_low_rank_of_all_directions_is_exact():
    start, workers = work("rank_3")
    merged = ff.merge(workers, start)
    mean, information = streams.fit("stationary", 5)
    np.testing.assert_allclose(
        streams.dense(merged.information), information, rtol=1e-10
    )
    np.testing.assert_allclose(streams.flat(merged.mean), mean, rtol=1e-9)


def test_low_rank_stays_positive_definite_after_many_rounds():
    flow = streams.flow("low_rank", "stationary")
    state = streams.start(flow)
    for _ in range(10):
        workers = [streams.run(flow, state, [b])[-1] for b in streams.batches(4)[:3]]
        state = ff.merge(workers, state)
        values = np.linalg.eigvalsh(streams.dense(state.information))
        assert values.min() > 0.9 * streams.PRECISION
    assert np.isfinite(streams.flat(state.mean)).all()

"""Merging in the structures that keep less than the whole information."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
import streams

pytestmark = pytest.mark.usefixtures("strict_promotion")


def work(structure):
    flow = streams.flow(structure, "stationary")
    batches = streams.batches(4)
    start = streams.run(flow, streams.start(flow), batches[:2])[-1]
    return start, [streams.run(flow, start, [batch])[-1] for batch in batches[2:]]


@pytest.mark.slow_cases
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


def _flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_a_flow_of_agreeing_workers_moves_by_the_prior_alone(structure):
    """The reference is the solve with the sum of the workers' operators."""
    model = (lambda p, x: x @ p["w"] + p["b"][None]), ff.likelihoods.categorical()
    params = {"b": jnp.zeros(3), "w": jnp.zeros((4, 3))}
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 60, 4))
    x[1] = x[1] * [3, 1, 0.3, 1] + 1
    structures = {
        "diagonal": ff.structures.diagonal(),
        "kronecker": ff.structures.kronecker(
            ff.layers.find_layers(model[0], params, x[0])
        ),
    }
    flow = ff.fisher_flow(*model, structure=structures[structure], prior_precision=1e-2)
    start = flow.init(params)
    targets = rng.integers(0, 3, 60)
    common = {"b": rng.normal(size=3), "w": rng.normal(size=(4, 3))}
    common = jax.tree.map(jnp.asarray, common)
    workers = []
    for inputs in x:
        information = flow.evaluate(common, (inputs, targets))[2]
        workers.append(flow.absorb(start, common, information, 60))
    merged = ff.merge(workers, start)
    to_dense = ff.information.to_dense
    own = [np.asarray(to_dense(w.information, params)) for w in workers]
    prior = 1e-2 * np.eye(15)
    pull = (own[0] + own[1]) @ _flat(common)
    expected = np.linalg.solve(own[0] + own[1] - prior, pull)
    assert np.abs(_flat(common)).max() > 1
    np.testing.assert_allclose(_flat(merged.mean), expected, rtol=0, atol=1e-6)
    assert merged.events.searches_unfinished == 0
    assert merged.count == 120
    # a worker from a start that has seen data adds its own operator alone
    if structure == "kronecker":
        again, _ = flow.update(workers[0], (x[1], targets))
        one = ff.merge([again], workers[0])
        np.testing.assert_allclose(_flat(one.mean), _flat(again.mean), atol=1e-9)

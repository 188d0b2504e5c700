"""Newton's steps, the warm start and the refinement, against the batch mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

TARGETS = {"bernoulli": streams.LABELS, "poisson": streams.COUNTS}


def moments(likelihood, line):
    if likelihood == "poisson":
        return np.exp(line), np.exp(line)
    mean = 1 / (1 + np.exp(-line))
    return mean, mean * (1 - mean)


def mode(likelihood, rows=slice(None), precision=streams.PRECISION):
    """The posterior's mode and information: Newton in numpy, all rows at once."""
    inputs, targets = streams.INPUTS[rows], TARGETS[likelihood][rows]
    weights, mean = streams.WEIGHTS[rows], np.zeros(3)
    for _ in range(100):
        expected, variance = moments(likelihood, inputs @ mean)
        gradient = inputs.T @ (weights * (targets - expected))
        gradient -= precision * (mean - streams.ORIGIN)
        information = (inputs.T * weights * variance) @ inputs + precision * np.eye(3)
        step = np.linalg.solve(information, gradient)
        mean = mean + step / max(1, np.linalg.norm(step))
    assert np.linalg.norm(gradient) < 1e-10
    return mean, information


def logistic():
    return streams.flow("full", "stationary", "bernoulli", num_steps=4, robust=True)


BATCHES = streams.batches(8, "bernoulli")
STACKED = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *BATCHES)


def streamed():
    return streams.run(logistic(), streams.start(logistic()), BATCHES)[-1]


@pytest.mark.slow_cases
@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson"])
def test_warm_start_reaches_the_mode_of_its_batch(likelihood):
    flow = streams.flow("full", "stationary", likelihood, num_steps=4, robust=True)
    batch = streams.batches(24, likelihood)[0]
    state = ff.warm_start(flow, streams.start(flow), batch)
    mean, information = mode(likelihood)
    np.testing.assert_allclose(streams.flat(state.mean), mean, atol=1e-6)
    np.testing.assert_allclose(streams.dense(state.information), information, rtol=1e-5)
    assert state.count == streams.WEIGHTS.sum() and state.step == 1
    # the scores of a warm start are taken at its solution, not at the cold start
    expected, _ = moments(likelihood, streams.INPUTS @ mean)
    scores = streams.INPUTS * (TARGETS[likelihood] - expected)[:, None]
    meat = (scores.T * streams.WEIGHTS) @ scores
    np.testing.assert_allclose(streams.dense(state.meat), meat, rtol=1e-4, atol=1e-4)


def test_a_diagonal_solves_for_the_same_mode():
    """The search is approximate in its steps, not in where it ends."""
    flow = streams.flow("diagonal", "stationary", "bernoulli")
    state = ff.warm_start(
        flow, streams.start(flow), streams.batches(24, "bernoulli")[0]
    )
    np.testing.assert_allclose(
        streams.flat(state.mean), mode("bernoulli")[0], atol=1e-3
    )


def test_laplaces_evidence_of_a_warm_start():
    state = ff.warm_start(
        logistic(), streams.start(logistic()), streams.batches(24, "bernoulli")[0]
    )
    mean, information = mode("bernoulli")
    line = streams.INPUTS @ mean
    value = streams.WEIGHTS @ (streams.LABELS * line - np.logaddexp(0, line))
    value -= 0.5 * streams.PRECISION * np.sum((mean - streams.ORIGIN) ** 2)
    value += 1.5 * np.log(streams.PRECISION)
    value -= 0.5 * np.linalg.slogdet(information)[1]
    np.testing.assert_allclose(state.log_evidence, value, rtol=1e-8)


@pytest.mark.parametrize("stored", [STACKED, BATCHES], ids=["stack", "list of batches"])
def test_two_refinements_reach_the_mode_of_all_data(stored):
    start = streamed()
    mean, information = mode("bernoulli")
    assert np.abs(streams.flat(start.mean) - mean).max() > 1e-3
    refine = jax.jit(lambda state: ff.refine(logistic(), state, stored))
    state = refine(refine(refine(start)))
    np.testing.assert_allclose(streams.flat(state.mean), mean, atol=1e-6)
    np.testing.assert_allclose(streams.dense(state.information), information, rtol=1e-5)
    expected, _ = moments("bernoulli", streams.INPUTS @ mean)
    scores = (streams.LABELS - expected)[:, None] * streams.INPUTS
    meat = (scores.T * streams.WEIGHTS) @ scores
    np.testing.assert_allclose(streams.dense(state.meat), meat, rtol=1e-5, atol=1e-6)
    # the rest stays that of the stream
    for name in ("count", "step"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(state, name), getattr(start, name)
        )
    warm = ff.warm_start(
        logistic(), streams.start(logistic()), streams.batches(24, "bernoulli")[0]
    )
    np.testing.assert_allclose(state.log_evidence, warm.log_evidence, rtol=1e-6)


@pytest.mark.slow
def test_one_refinement_is_one_newton_step():
    start = streamed()
    ragged = [
        tuple(x[cut] for x in streams.batches(24, "bernoulli")[0])
        for cut in (slice(0, 5), slice(5, 6), slice(6, 24))
    ]
    with pytest.raises(ValueError, match="twice: give a list"):
        ff.refine(logistic(), start, iter(ragged))
    state = ff.refine(logistic(), start, ragged)
    at = streams.flat(start.mean)
    expected, variance = moments("bernoulli", streams.INPUTS @ at)
    weights = streams.WEIGHTS
    information = (streams.INPUTS.T * weights * variance) @ streams.INPUTS
    information += streams.PRECISION * np.eye(3)
    gradient = streams.INPUTS.T @ (weights * (streams.LABELS - expected))
    gradient -= streams.PRECISION * (at - streams.ORIGIN)
    mean = at + np.linalg.solve(information, gradient)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
    np.testing.assert_allclose(streams.dense(state.information), information)


@pytest.mark.slow
def test_refining_a_marginal_flow_keeps_the_marginals_of_the_whole():
    flow = streams.flow("diagonal", "stationary", num_steps=1, marginal=True)
    batches = streams.batches(12)
    state = streams.run(flow, streams.start(flow), batches)[-1]
    refined = ff.refine(flow, state, iter(batches))
    mean, information = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(refined.mean), mean, rtol=1e-9)
    variances = np.diag(np.linalg.inv(information))
    np.testing.assert_allclose(
        streams.flat(ff.standard_error(refined)), np.sqrt(variances), rtol=1e-9
    )
    assert type(refined.information) is type(state.information)


def test_refining_keeps_compensated_pairs():
    flow = streams.flow("full", "stationary", compensated=True, robust=True)
    state = streams.run(flow, streams.start(flow), streams.batches(4))[-1]
    refined = ff.refine(flow, state, streams.batches(24))
    assert jax.tree.structure(refined) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "memory", ["exponential", "windowed", "random_walk", "adaptive"]
)
def test_refining_refuses_memories_that_forget(memory):
    flow = streams.flow("full", memory)
    with pytest.raises(ValueError, match="stationary memory"):
        ff.refine(flow, streams.start(flow), streams.batches(24))


def test_refining_refuses_no_data_and_bad_data():
    flow, state = logistic(), streamed()
    with pytest.raises(ValueError, match="at least one batch; got none"):
        ff.refine(flow, state, [])
    inputs, labels, weights = BATCHES[0]
    bad = (np.where(inputs > 1, np.nan, inputs), labels, weights)
    with pytest.raises(ValueError, match=r"row \d of batch 0 has inputs\["):
        ff.refine(flow, state, [bad])
    huge = (inputs, labels, np.full(len(weights), 1e308))  # their sum is infinite
    with pytest.raises(ValueError, match="not finite"):
        ff.refine(flow, state, [huge])
    kept = jax.jit(lambda s: ff.refine(flow, s, [huge]))(state)
    assert kept.num_skipped == 1
    np.testing.assert_array_equal(streams.flat(kept.mean), streams.flat(state.mean))


@pytest.mark.slow
def test_refining_looks_at_every_batch_of_a_stack():
    inputs, labels, weights = (np.array(x) for x in STACKED)
    labels[2, 1], inputs[1, 3, 0] = 7.0, np.nan
    bad = inputs, labels, weights
    start, told = streamed(), r"row 3 of batch 1 has inputs\[3, 0\] = nan"
    for stored in (bad, ff.Batch(*bad), list(zip(*bad, strict=True))):
        with pytest.raises(ValueError, match=told):
            ff.refine(logistic(), start, stored)
    weights = weights.copy()
    weights[2, 1] = weights[1, 3] = 0
    expected = ff.refine(logistic(), start, (inputs, labels, weights))
    dropping = streams.flow(
        "full",
        "stationary",
        "bernoulli",
        num_steps=4,
        robust=True,
        bad_rows="drop",
    )
    traced = jax.jit(lambda state, stored: ff.refine(logistic(), state, stored))
    for found in (ff.refine(dropping, start, bad), traced(start, bad)):
        assert found.events.rows_skipped == 2 and expected.events.rows_skipped == 0
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9),
            found._replace(events=None),
            expected._replace(events=None),
        )


def test_warm_start_refuses_bad_data():
    inputs, labels, weights = BATCHES[0]
    with pytest.raises(
        ValueError, match=r"row 0 of the batch has inputs\[0, 0\] = nan"
    ):
        ff.warm_start(
            logistic(), streams.start(logistic()), (inputs * np.nan, labels, weights)
        )


def test_a_step_that_would_overshoot_is_halved():
    """A Poisson model from far below: full Newton steps would overflow at once."""
    flow = ff.fisher_flow(
        lambda params, x: x * params,
        ff.likelihoods.poisson(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-4,
    )
    batch = (np.full(4, 3.0), np.array([5.0, 7.0, 6.0, 6.0]))
    state = ff.warm_start(flow, flow.init(np.float64(-4.0)), batch)
    # rate exp(3 theta) = 6 up to the weak prior
    np.testing.assert_allclose(np.exp(3 * state.mean), 6.0, rtol=1e-3)

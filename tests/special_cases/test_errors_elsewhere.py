"""Errors that filters and continual-learning code elsewhere make, and ours does not.

Found by reading and running other projects (dynamax, rebayes, rebayes-mini, posteriors,
avalanche, river, and published Fisher merging); each test says what goes wrong there.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
import streams


def last(flow, size=4, state=None):
    state = streams.start(flow) if state is None else state
    return streams.run(flow, state, streams.batches(size))[-1]


def test_the_predicted_belief_reaches_the_update():
    """A filter that updates the belief from before its prediction ignores the noise:
    its result is that of a filter without any."""
    noisy = last(streams.flow("full", "random_walk"))
    still = last(streams.flow("full", "stationary"))
    mean, covariance = streams.ORIGIN, np.eye(3) / streams.PRECISION
    for inputs, targets, weights in streams.batches(4):
        covariance = covariance + 0.1 * np.eye(3)
        precision = np.linalg.inv(covariance)
        weighted = inputs.T * weights / streams.SCALE**2
        covariance = np.linalg.inv(precision + weighted @ inputs)
        mean = covariance @ (precision @ mean + weighted @ targets)
    np.testing.assert_allclose(streams.flat(noisy.mean), mean, rtol=1e-9)
    assert np.abs(streams.flat(still.mean) - mean).max() > 0.01
    assert (ff.standard_error(noisy)["slope"] > ff.standard_error(still)["slope"]).all()


def test_more_steps_do_not_count_the_data_again():
    """An iterated filter that takes each step's posterior as the next one's prior
    counts the batch once a step: its standard errors shrink by the root of it."""
    state = last(streams.flow("full", "stationary", num_steps=4))
    mean, information = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(state.mean), mean, rtol=1e-10)
    np.testing.assert_allclose(
        streams.dense(state.information), information, rtol=1e-10
    )


@pytest.mark.parametrize("structure", ["full", "diagonal", "units"])
def test_data_never_make_the_belief_less_sure(structure):
    """A dense filter that subtracts the Fisher from the precision grows its variance
    with every batch, where its diagonal twin has the right sign."""
    flow = streams.flow(structure, "stationary")
    states = [streams.start(flow)]
    states += streams.run(flow, states[0], streams.batches(4))
    for before, after in itertools.pairwise(states):
        gain = streams.dense(after.information) - streams.dense(before.information)
        assert np.linalg.eigvalsh(gain).min() > -1e-9
        assert np.trace(gain) > 1


@pytest.mark.parametrize("size", [1, 8])
def test_information_is_a_sum_whatever_the_batch_size(size):
    """A Fisher that is a batch mean tells a batch of a hundred as much as one row:
    the belief then depends on how the stream was cut."""
    state = last(streams.flow("full", "stationary"), size)
    information = streams.fit("stationary", 5)[1]
    np.testing.assert_allclose(
        streams.dense(state.information), information, rtol=1e-10
    )


@pytest.mark.slow
def test_the_noise_is_estimated_without_bias():
    """A running mean of squared residuals at the *updated* mean is too small: half the
    truth at fifty rows and ten parameters."""
    flow = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(scale=None),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-6,
        num_steps=1,
    )

    def one(key):
        inputs = jax.random.normal(key, (10, 5, 10))
        targets = jax.random.normal(jax.random.fold_in(key, 1), (10, 5))
        state = flow.init(jnp.zeros(10))
        return jax.lax.scan(flow.update, state, (inputs, targets))[0].dispersion

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 400))
    # its own deviation is sqrt(2 / 40 / 400) = 0.011
    assert abs(values.mean() - 1) < 0.04
    assert stats.kstest(40 * values, stats.chi2(40).cdf).pvalue > 0.01


def test_samples_have_the_covariance_and_not_its_mirror():
    """With a lower factor L, contracting draws over the wrong axis gives L' L."""
    covariance = np.array([[4.0, 1.8], [1.8, 1.0]])
    state = ff.fisher_flow(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=ff.structures.Full(jnp.asarray(np.linalg.inv(covariance))),
    ).init(jnp.zeros(2))
    draws = np.asarray(ff.sample(state, key=1, shape=(100_000,)))
    np.testing.assert_allclose(np.cov(draws.T), covariance, rtol=0.03)


def test_scale_is_a_standard_deviation():
    """Code that hands a variance to an argument `scale` is off by a square."""
    likelihood = ff.likelihoods.gaussian(scale=3.0)
    expected = stats.norm.logpdf(1.0, 0.0, 3.0)
    np.testing.assert_allclose(likelihood.log_prob(jnp.zeros(1), np.ones(1)), expected)
    np.testing.assert_allclose(likelihood.variance(jnp.zeros(1)), 9.0)
    draws = likelihood.sample(jax.random.key(0), jnp.zeros(40_000))
    assert abs(np.std(draws) - 3.0) < 5 * 3.0 / np.sqrt(2 * 40_000)
    flow = streams.flow("full", "stationary")
    start = streams.start(flow)
    state, _ = flow.update(start, (np.eye(4, 3), np.zeros(4), np.ones(4)))
    gain = streams.dense(state.information) - streams.dense(start.information)
    np.testing.assert_allclose(np.diag(gain), 1 / streams.SCALE**2)


def test_squared_scores_do_not_depend_on_how_the_data_are_cut():
    """An importance that squares a batch's *mean* gradient falls with the batch size,
    as the gradients of its rows cancel."""
    estimator = ff.estimators.empirical(
        streams.linear, ff.likelihoods.gaussian(streams.SCALE), ff.structures.diagonal()
    )
    at, compute = streams.tree(streams.ORIGIN), jax.jit(estimator)
    totals = [
        sum(streams.dense(compute(at, batch)) for batch in streams.batches(size))
        for size in (1, 24)
    ]
    np.testing.assert_allclose(totals[1], totals[0], rtol=1e-10)


@pytest.mark.parametrize("memory", ["stationary", "exponential", "windowed"])
def test_a_state_does_not_grow_with_the_stream(memory):
    """A recursive least squares that keeps every covariance in a list fills memory."""
    flow = streams.flow("full", memory)
    states = streams.run(flow, streams.start(flow), streams.batches(4))
    sizes = {sum(x.nbytes for x in jax.tree.leaves(state)) for state in states}
    assert len(sizes) == 1


def test_no_jitter_is_added_to_what_is_solved():
    """A constant of 1e-9 on every diagonal is lost in large covariances and rules in
    small ones; parameters in other units must give the same fit."""
    tiny = 1e-7  # parameters a hundred million times as large
    flow = ff.fisher_flow(
        streams.linear,
        ff.likelihoods.gaussian(streams.SCALE),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=streams.PRECISION * tiny**2,
        num_steps=1,
    )
    state = flow.init(streams.tree(np.zeros(3)), streams.tree(streams.ORIGIN / tiny))
    for inputs, targets, weights in streams.batches(4):
        state, _ = flow.update(state, (inputs * tiny, targets, weights))
    mean, information = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(state.mean) * tiny, mean, rtol=1e-11)
    np.testing.assert_allclose(
        streams.dense(state.information) / tiny**2, information, rtol=1e-11
    )


def test_merging_weighs_workers_by_what_they_saw():
    """Fisher merging that normalises each worker's Fisher lets four rows count as much
    as twenty."""
    flow = streams.flow("full", "stationary")
    start, batches = streams.start(flow), streams.batches(4)
    few = streams.run(flow, start, batches[:1])[-1]
    many = streams.run(flow, start, batches[1:])[-1]
    merged = ff.merge([few, many], start)
    mean, information = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(merged.mean), mean, rtol=1e-11)
    np.testing.assert_allclose(
        streams.dense(merged.information), information, rtol=1e-11
    )


def test_merging_counts_the_prior_once():
    """A sum of workers' posteriors counts what they share once for each of them."""
    flow = streams.flow("full", "stationary")
    start = streams.start(flow)
    workers = [streams.run(flow, start, [b])[-1] for b in streams.batches(4)]
    merged = ff.merge(workers, start)
    summed = sum(streams.dense(w.information) for w in workers)
    expected = summed - 5 * streams.PRECISION * np.eye(3)
    np.testing.assert_allclose(streams.dense(merged.information), expected, rtol=1e-11)
    mean, _ = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(merged.mean), mean, rtol=1e-11)


def test_one_quadratic_holds_all_tasks():
    """A penalty that keeps a quadratic around each task's own solution counts early
    tasks again in the later ones' solutions; the flow's one quadratic does not."""
    flow = streams.flow("full", "stationary")
    states = streams.run(flow, streams.start(flow), streams.batches(8))
    mean, _ = streams.fit("stationary", 5)
    np.testing.assert_allclose(streams.flat(states[-1].mean), mean, rtol=1e-10)


@pytest.mark.slow
def test_rows_without_an_estimate_of_their_own_are_no_obstacle():
    """A formula that averages the batches' own maximum likelihood estimates fails where
    a batch has none (one row; labels all alike), and stays biased where it has."""
    flow = streams.flow("full", "stationary", "bernoulli", num_steps=4, robust=True)
    rows = last_logistic(flow, 1)
    whole = last_logistic(flow, 24)
    error = streams.flat(ff.standard_error(whole))
    gap = np.abs(streams.flat(rows.mean) - streams.flat(whole.mean)) / error
    assert gap.max() < 1.5


def last_logistic(flow, size):
    batches = streams.batches(size, "bernoulli", np.ones(24))
    return streams.run(flow, streams.start(flow), batches)[-1]

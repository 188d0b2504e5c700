"""Errors found in other filters, each as a test that this one does not make it."""

import jax
import jax.numpy as jnp
import numpy as np

import fisherflow_jax as ff

SIZE = 3
_rng = np.random.default_rng(2)
INPUTS = jnp.asarray(_rng.normal(size=(30, 2, SIZE)))
TARGETS = INPUTS @ jnp.array([1.0, -1.0, 0.5]) + jnp.asarray(_rng.normal(size=(30, 2)))


def linear(params, x):
    return x @ params


def make(memory=None, **options):
    return ff.fisher_flow(
        linear,
        options.pop("likelihood", ff.likelihoods.gaussian()),
        structure=options.pop("structure", ff.structures.full()),
        memory=memory or ff.memories.stationary(),
        **options,
    )


def run(flow):
    return jax.lax.scan(flow.update, flow.init(jnp.zeros(SIZE)), (INPUTS, TARGETS))


def test_the_predicted_belief_reaches_the_update():
    # a scan that updates the belief before prediction filters as if without noise
    still, _ = run(make())
    moving, _ = run(make(ff.memories.random_walk(0.01)))
    gap = (moving.mean - still.mean) / ff.standard_error(still)
    assert float(jnp.max(jnp.abs(gap))) > 0.05
    ratio = ff.standard_error(moving) / ff.standard_error(still)
    assert float(jnp.min(ratio)) > 1.2


def test_more_steps_do_not_count_the_data_again():
    # an iterated filter that takes its last posterior for the prior does
    once, _ = run(make(num_steps=1))
    often, _ = run(make(num_steps=6))
    np.testing.assert_allclose(often.mean, once.mean, rtol=1e-10)
    np.testing.assert_allclose(
        ff.standard_error(often), ff.standard_error(once), rtol=1e-10
    )


def test_data_narrow_the_posterior_and_by_their_sum():
    # a filter that subtracts the information widens; one that adds a batch's mean
    # information narrows by too little
    flow = make(prior_precision=2.0)
    state = flow.init(jnp.zeros(SIZE))
    for x, y in zip(INPUTS[:5], TARGETS[:5], strict=True):
        after, _ = flow.update(state, (x, y))
        added = ff.information.to_dense(after.information) - ff.information.to_dense(
            state.information
        )
        np.testing.assert_allclose(added, x.T @ x, atol=1e-12)
        assert bool(jnp.all(ff.standard_error(after) < ff.standard_error(state)))
        state = after


def test_the_dispersion_is_not_that_of_posterior_residuals():
    # residuals after the update are too small: with 10 parameters and 50 rows they
    # estimate about half of a dispersion of one
    size, rows, repeats = 10, 50, 200
    flow = make(likelihood=ff.likelihoods.gaussian(scale=None), prior_precision=1e-6)

    def one(key):
        first, second = jax.random.split(key)
        x = jax.random.normal(first, (rows, 1, size))
        y = jax.random.normal(second, (rows, 1))
        state, _ = jax.lax.scan(flow.update, flow.init(jnp.zeros(size)), (x, y))
        return state.dispersion

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), repeats))
    # the estimate's standard deviation is sqrt(2 / 40) a repeat
    assert abs(float(jnp.mean(values)) - 1.0) < 4 * np.sqrt(2 / 40 / repeats)


def test_samples_have_the_covariance_not_its_transposed_factor():
    covariance = jnp.array([[4.0, 1.8], [1.8, 1.0]])
    information = ff.structures.Full(jnp.linalg.inv(covariance))
    keys = jax.random.split(jax.random.key(1), 40_000)
    draws = jax.vmap(lambda key: ff.information.sample(information, key))(keys)
    # five standard errors of an entry of a sample covariance
    bound = 5 * np.sqrt(2 / 40_000) * np.diagonal(covariance).max()
    np.testing.assert_allclose(jnp.cov(draws.T), covariance, atol=bound)


def test_an_observation_has_a_standard_deviation_not_a_variance():
    likelihood = ff.likelihoods.gaussian(3.0)
    draws = likelihood.sample(jax.random.key(0), jnp.zeros(40_000))
    assert abs(float(jnp.std(draws)) - 3.0) < 5 * 3.0 / np.sqrt(2 * 40_000)
    state, _ = run(make(likelihood=likelihood))
    prediction = ff.predict(state, linear, INPUTS[0], likelihood)
    np.testing.assert_allclose(
        prediction.observation_std**2, prediction.std**2 + 9.0, rtol=1e-12
    )


def test_importance_does_not_depend_on_the_batch_size():
    # squares of batch means fall as one over the batch size
    estimator = ff.estimators.empirical(
        linear, ff.likelihoods.gaussian(), ff.structures.diagonal()
    )
    x, y = INPUTS.reshape(-1, SIZE), TARGETS.reshape(-1)
    whole = estimator(jnp.zeros(SIZE), (x, y)).entries
    parts = sum(
        estimator(jnp.zeros(SIZE), (a, b)).entries
        for a, b in zip(INPUTS, TARGETS, strict=True)
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_a_state_does_not_grow_with_the_stream():
    flow = make(ff.memories.exponential(0.99))
    start = flow.init(jnp.zeros(SIZE))
    end, _ = run(flow)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, end)


def test_solves_add_no_jitter():
    state, _ = run(make(prior_precision=1e-3))
    vector = jnp.array([1.0, 2.0, 3.0])
    solved = ff.information.solve(state.information, vector)
    dense = np.asarray(ff.information.to_dense(state.information))
    np.testing.assert_allclose(solved, np.linalg.solve(dense, vector), rtol=1e-13)


def test_merging_counts_sample_sizes_and_the_prior_once():
    # averaging normalised informations forgets how much each worker saw; summing whole
    # posteriors counts the prior once a worker
    flow = make(prior_precision=5.0)
    start = flow.init(jnp.zeros(SIZE))
    cuts = ((0, 1), (1, 5), (5, 30))
    workers = [
        jax.lax.scan(flow.update, start, (INPUTS[a:b], TARGETS[a:b]))[0]
        for a, b in cuts
    ]
    merged, (one, _) = ff.merge(workers, start), run(flow)
    np.testing.assert_allclose(merged.mean, one.mean, rtol=1e-11)
    np.testing.assert_allclose(
        ff.information.to_dense(merged.information),
        ff.information.to_dense(one.information),
        rtol=1e-11,
    )

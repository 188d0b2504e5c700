"""Weights are multiplicities; rows of weight zero are never seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import COUNT, NAMED, STRUCTURES, WEIGHTS

EXACT = {"rtol": 1e-10, "atol": 1e-12}
MODEL = NAMED["labels"]
KEY = 5


@functools.cache
def estimator(name, chunk_size=None):
    factory = getattr(ff.estimators, name)
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    built = factory(MODEL.apply_fn, MODEL.likelihood, STRUCTURES["full"], **options)
    # without a key where none is drawn from, so that none is asked for
    key = KEY if built.random else None

    @jax.jit
    def dense(params, batch):
        return ff.information.to_dense(built(params, batch, key))

    return dense


every_estimator = pytest.mark.parametrize(
    "name", ["exact", "monte_carlo", "empirical", "observed", "squared_gradient"]
)
sums = pytest.mark.parametrize("name", ["exact", "empirical", "observed"])
chunk_sizes = pytest.mark.parametrize("chunk_size", [None, 3])


def test_weighted_sums_against_the_jacobian():
    result = estimator("exact")(MODEL.params, (*MODEL.batch, WEIGHTS))
    np.testing.assert_allclose(result, cases.fisher("labels", WEIGHTS), **EXACT)
    result = estimator("exact", 3)(MODEL.params, (*MODEL.batch, WEIGHTS))
    np.testing.assert_allclose(result, cases.fisher("labels", WEIGHTS), **EXACT)


@pytest.mark.slow_cases
@sums
@chunk_sizes
def test_a_weight_of_two_is_a_row_twice(name, chunk_size):
    run = estimator(name, chunk_size)
    weights = np.ones(COUNT)
    weights[[2, 5]] = 2.0, 0.0
    rows = [0, 1, 2, 2, 3, 4, 6]
    twice = MODEL.inputs[rows], MODEL.targets[rows], np.ones(COUNT)
    np.testing.assert_allclose(
        run(MODEL.params, (*MODEL.batch, weights)), run(MODEL.params, twice), **EXACT
    )


@pytest.mark.slow_cases
@every_estimator
def test_no_weights_are_weights_of_one(name):
    run = estimator(name)
    np.testing.assert_allclose(
        run(MODEL.params, MODEL.batch),
        run(MODEL.params, (*MODEL.batch, np.ones(COUNT))),
        **EXACT,
    )


@every_estimator
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_of_weight_zero_may_hold_anything(name, bad):
    run, padding = estimator(name), WEIGHTS == 0
    inputs, targets = MODEL.inputs.copy(), MODEL.targets.copy()
    inputs[padding], targets[padding] = bad, bad
    np.testing.assert_allclose(
        run(MODEL.params, (inputs, targets, WEIGHTS)),
        run(MODEL.params, (*MODEL.batch, WEIGHTS)),
        **EXACT,
    )


@sums
def test_chunks_of_padding_alone_add_nothing(name):
    weights = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    inputs = np.where(weights[:, None] > 0, MODEL.inputs, np.nan)
    np.testing.assert_allclose(
        estimator(name, 3)(MODEL.params, (inputs, MODEL.targets, weights)),
        estimator(name)(MODEL.params, (*MODEL.batch, weights)),
        **EXACT,
    )


@pytest.mark.parametrize("name", ["exact", "monte_carlo", "empirical", "observed"])
def test_a_batch_of_padding_alone_adds_nothing(name):
    inputs = np.full((COUNT, 3), np.nan)
    batch = inputs, MODEL.targets, np.zeros(COUNT)
    assert not np.any(estimator(name)(MODEL.params, batch))


@pytest.mark.parametrize("name", ["exact", "monte_carlo", "empirical"])
@pytest.mark.parametrize("pole", [0.0, 1.0])
def test_nothing_is_added_even_where_the_blanked_rows_are_not_finite(name, pole):
    structure = STRUCTURES["diagonal"]
    built = getattr(ff.estimators, name)(
        lambda params, x: (1 / (x - pole)) @ params,
        ff.likelihoods.gaussian(),
        structure,
    )
    batch = np.zeros((2, 3)), np.zeros(2), np.zeros(2)
    information = jax.jit(built)(np.ones(3), batch, jax.random.key(KEY))
    np.testing.assert_array_equal(information.entries, np.zeros(3))


@every_estimator
@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_weights_that_are_none_do_not_pass_silently_under_jit(name, bad):
    weights = np.where(np.arange(COUNT) == 3, bad, 1.0)
    result = estimator(name)(MODEL.params, (*MODEL.batch, weights))
    assert np.all(np.isnan(result))


@pytest.mark.parametrize("dtype", [np.int32, bool, np.float32])
def test_weights_of_any_real_type(dtype):
    weights = (np.arange(COUNT) % 2).astype(dtype)
    result = estimator("exact")(MODEL.params, ff.Batch(*MODEL.batch, weights))
    expected = cases.fisher("labels", weights.astype(np.float64))
    np.testing.assert_allclose(result, expected, **EXACT)


def test_what_a_compiled_function_closes_over_is_as_what_it_is_given():
    """Weights of one or given ones; a bad row is left out, as under jit."""
    built = ff.estimators.exact(
        lambda params, x: x @ params, ff.likelihoods.gaussian(), ff.structures.full()
    )
    params, weights = jnp.zeros(2), jnp.array([1.0, 2.0, 1.0])
    inputs = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 0.0]])
    for batch in ((inputs, jnp.zeros(3)), (inputs, jnp.zeros(3), weights)):
        over = jax.jit(lambda batch=batch: built(params, batch))()
        given = jax.jit(built)(params, batch)
        np.testing.assert_array_equal(*map(jax.tree.leaves, (over, given)))

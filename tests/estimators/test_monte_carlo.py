"""Sampled scores: unbiased, one key a draw, the same draws however they are chunked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import NAMED, STRUCTURES, WEIGHTS

REPEATS = 1000
# 120 to 190 entries of a matrix are looked at, with fixed keys.
STANDARD_ERRORS = 4.5
KEY = jax.random.key(3)


def monte_carlo(model, structure="full", **options):
    return ff.estimators.monte_carlo(
        model.apply_fn, model.likelihood, STRUCTURES[structure], **options
    )


def z_scores(estimator, params, batch, expected):
    """How many standard errors the mean of REPEATS draws is away from `expected`."""

    @jax.jit
    def moments(keys):
        def one(key):
            return ff.information.to_dense(estimator(params, batch, key), params)

        drawn = jax.vmap(one)(keys)
        return jnp.mean(drawn, 0), jnp.std(drawn, 0)

    mean, deviation = moments(jax.random.split(KEY, REPEATS))
    error = np.asarray(deviation) / np.sqrt(REPEATS) + 1e-12
    return (np.asarray(mean) - expected) / error


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["categorical", "poisson"])
def test_unbiased(name):
    model = NAMED[name]
    estimator = monte_carlo(model, num_samples=2)
    batch = (*model.batch, WEIGHTS)
    expected = cases.fisher(model.name, WEIGHTS)
    z = z_scores(estimator, model.params, batch, expected)
    assert np.abs(z).max() < STANDARD_ERRORS


def location(num_samples):
    """The information about one location, drawn for each of the inputs."""
    estimator = ff.estimators.monte_carlo(
        lambda params, x: x * params,
        ff.likelihoods.gaussian(),
        STRUCTURES["scalar"],
        num_samples=num_samples,
    )
    return lambda inputs, key: estimator(jnp.asarray(0.0), (inputs, None), key).value


def test_the_variance_falls_as_the_number_of_samples():
    keys = jax.random.split(KEY, 1000)
    one, many = (
        np.var(jax.jit(jax.vmap(location(m), in_axes=(None, 0)))(np.ones(1), keys))
        for m in (1, 16)
    )
    # squared normals, of kurtosis 15: the log of the ratio has deviation 0.13
    assert 16 / 1.6 < one / many < 16 * 1.6


def test_examples_that_are_equal_draw_for_themselves():
    # were the draws shared, every example would add the same score
    value = jax.jit(location(1))(np.ones(400), KEY)
    # a chi-square with 400 degrees of freedom, within 4.5 standard deviations
    assert 0 < abs(value - 400) < 4.5 * np.sqrt(800)


@functools.cache
def drawn(structure, chunk_size):
    model = NAMED["labels"]
    estimator = monte_carlo(model, structure, num_samples=3, chunk_size=chunk_size)
    return jax.jit(estimator)(model.params, model.batch, KEY)


@pytest.mark.parametrize("chunk_size", [3])
def test_chunking_changes_no_draw(chunk_size):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10),
        drawn("diagonal", chunk_size),
        drawn("diagonal", None),
    )


def test_the_same_key_gives_the_same_numbers_eager_or_jit_and_in_every_form():
    inputs = np.array([1.0, 2.0, 3.0])
    run = jax.jit(location(3))
    expected = run(inputs, KEY)
    for found in (location(3)(inputs, 3), run(inputs, jax.random.key_data(KEY))):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_another_key_gives_other_numbers():
    model = NAMED["labels"]
    estimator = jax.jit(monte_carlo(model, "diagonal"))
    one, other = (
        estimator(model.params, model.batch, jax.random.key(k)) for k in (3, 4)
    )
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.all(np.asarray(x) != y)


def test_labels_are_not_needed():
    model = NAMED["labels"]
    estimator = jax.jit(monte_carlo(model, "scalar"))
    with_labels = estimator(model.params, model.batch, KEY)
    without = estimator(model.params, (model.inputs, None), KEY)
    np.testing.assert_array_equal(with_labels.value, without.value)


def test_a_missing_key_is_asked_for():
    model = NAMED["labels"]
    with pytest.raises(ValueError, match=r"monte_carlo draws at random: give it a key"):
        monte_carlo(model)(model.params, model.batch)


@pytest.mark.parametrize("key", [1.0, np.zeros(2), True])
def test_what_is_no_key_is_refused(key):
    model = NAMED["labels"]
    with pytest.raises(ValueError, match=r"key must be an int, a key of jax.random"):
        monte_carlo(model)(model.params, model.batch, key)


@pytest.mark.parametrize("num_samples", [0, -3, 1.0, None])
def test_a_number_of_samples_that_is_none_is_refused(num_samples):
    with pytest.raises(ValueError, match=f"positive whole number; got {num_samples}"):
        monte_carlo(NAMED["labels"], num_samples=num_samples)


def gaussian_log_prob(outputs, targets):
    return -0.5 * jnp.square((targets - outputs) / 0.7)


def gaussian_sample(key, outputs):
    return outputs + 0.7 * jax.random.normal(key, outputs.shape, outputs.dtype)


GENERIC = ff.likelihoods.from_log_prob(
    gaussian_log_prob, gaussian_sample, num_samples=4
)


@pytest.mark.slow
def test_exact_with_a_sampled_root_is_unbiased():
    model = NAMED["gaussian"]
    estimator = ff.estimators.exact(
        model.apply_fn, GENERIC, STRUCTURES["full"], chunk_size=3
    )
    expected = cases.fisher("gaussian", WEIGHTS)
    z = z_scores(estimator, model.params, (*model.batch, WEIGHTS), expected)
    assert np.abs(z).max() < STANDARD_ERRORS


def test_exact_with_a_sampled_root_needs_a_key():
    model = NAMED["gaussian"]
    estimator = ff.estimators.exact(model.apply_fn, GENERIC, STRUCTURES["diagonal"])
    assert estimator.random
    with pytest.raises(ValueError, match="exact draws at random: give it a key"):
        estimator(model.params, model.batch)


def test_a_key_is_harmless_where_nothing_is_drawn():
    model = NAMED["gaussian"]
    estimator = jax.jit(
        ff.estimators.exact(model.apply_fn, model.likelihood, STRUCTURES["diagonal"])
    )
    with_key = estimator(model.params, model.batch, KEY)
    without = estimator(model.params, model.batch)
    jax.tree.map(np.testing.assert_array_equal, with_key, without)

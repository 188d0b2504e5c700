"""The generic likelihood: its root of sampled scores approaches the closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax import likelihoods

POISSON, BERNOULLI = likelihoods.poisson(), likelihoods.bernoulli()
GENERIC = likelihoods.from_log_prob(BERNOULLI.log_prob, BERNOULLI.sample)
KEY = jax.random.PRNGKey(0)


@functools.partial(jax.jit, static_argnums=0)
def squared_columns(likelihood, outputs, key):
    """(n, d, d): L L^T of every example, over its flattened outputs."""
    columns = likelihoods.root_columns(likelihood, outputs, key)
    flat = columns.reshape(*columns.shape[:2], -1)
    return jnp.einsum("rni,rnj->nij", flat, flat)


@pytest.mark.slow
def test_root_approaches_that_of_poisson():
    """Within 5 standard errors over 4000 examples of 16 samples."""
    generic = likelihoods.from_log_prob(POISSON.log_prob, POISSON.sample)
    log_rates = np.array([-1.0, 0.5, 2.0])
    outputs = jnp.asarray(np.repeat(log_rates, 4000))
    fisher = np.asarray(squared_columns(generic, outputs, KEY)).reshape(3, 4000)
    error = fisher.std(1) / np.sqrt(4000)
    assert np.all(error < 0.05 * np.exp(log_rates))
    assert np.all(np.abs(fisher.mean(1) - np.exp(log_rates)) <= 5 * error)


def test_root_approaches_that_of_categorical():
    closed = likelihoods.categorical()
    generic = likelihoods.from_log_prob(closed.log_prob, closed.sample, num_samples=4)
    row = np.array([0.3, -1.2, 1.0])
    outputs = jnp.broadcast_to(jnp.asarray(row), (4000, 3))
    assert generic.probe_shape(outputs.shape) == (4000, 4)
    fisher = np.asarray(squared_columns(generic, outputs, KEY))
    error = fisher.std(0) / np.sqrt(len(fisher))
    expected = squared_columns(closed, jnp.asarray(row)[None], None)[0]
    assert np.all(np.abs(fisher.mean(0) - expected) <= 5 * error)


@pytest.mark.parametrize("num_samples", [1, 16])
def test_more_samples_are_more_exact(num_samples):
    """Scores of N(0, 1) squared have variance 2; the estimate averages m of them."""
    normal = likelihoods.gaussian()
    generic = likelihoods.from_log_prob(
        normal.log_prob, normal.sample, num_samples=num_samples
    )
    fisher = np.asarray(squared_columns(generic, jnp.zeros(4000), KEY))
    # The variance of a sample variance: kurtosis 3 + 12 / m of a mean of m squares.
    relative_error = np.sqrt((2 + 12 / num_samples) / 4000)
    assert abs(fisher.var() * num_samples / 2 - 1) <= 5 * relative_error


def test_independent_targets_have_columns_of_their_own():
    outputs = jnp.zeros((5, 3))
    assert GENERIC.probe_shape(outputs.shape) == (5, 3, 16)
    fisher = np.asarray(squared_columns(GENERIC, outputs, KEY))
    off_diagonal = fisher[:, ~np.eye(3, dtype=bool)]
    np.testing.assert_array_equal(off_diagonal, np.zeros_like(off_diagonal))
    assert np.all(np.diagonal(fisher, axis1=1, axis2=2) > 0)


def test_root_is_linear_and_the_same_for_the_same_key():
    outputs = jnp.array([0.3, -0.7])
    first, second = np.random.default_rng(0).normal(size=(2, 2, 16))
    root = jax.jit(GENERIC.root)
    combined = root(outputs, first + 2.0 * second, KEY)
    separate = root(outputs, first, KEY) + 2.0 * root(outputs, second, KEY)
    np.testing.assert_allclose(combined, separate, rtol=1e-12)
    eager = GENERIC.root(outputs, first, KEY)
    np.testing.assert_allclose(root(outputs, first, KEY), eager, rtol=1e-12)
    other = root(outputs, first, jax.random.PRNGKey(1))
    assert not np.allclose(eager, other)


def test_root_needs_a_key():
    assert GENERIC.random_root
    with pytest.raises(ValueError, match="needs a key"):
        GENERIC.root(jnp.zeros(2), jnp.ones((2, 16)))
    with pytest.raises(ValueError, match="needs a key"):
        likelihoods.root_columns(GENERIC, jnp.zeros(2))


def test_narrow_outputs():
    outputs = jnp.zeros(3, jnp.bfloat16)
    probes = jnp.ones((3, 16), jnp.bfloat16)
    cotangents = jax.eval_shape(GENERIC.root, outputs, probes, KEY)
    assert cotangents.dtype == jnp.bfloat16 and cotangents.shape == (3,)
    assert GENERIC.log_prob(outputs, np.array([0, 1, 1])).dtype == jnp.float32


def test_log_prob_sample_and_support_are_those_given():
    outputs, targets = jnp.array([0.3, -0.7]), np.array([1, 0])
    np.testing.assert_array_equal(
        GENERIC.log_prob(outputs, targets), BERNOULLI.log_prob(outputs, targets)
    )
    np.testing.assert_array_equal(
        GENERIC.sample(KEY, outputs), BERNOULLI.sample(KEY, outputs)
    )
    assert np.all(GENERIC.support(np.array([-1.0, np.nan])))


def test_missing_moments_say_what_to_pass():
    for function in (GENERIC.mean, GENERIC.line):
        with pytest.raises(ValueError, match="mean=") as error:
            function(jnp.zeros(2))
        assert "from_log_prob" in str(error.value)
    with pytest.raises(ValueError, match="variance="):
        GENERIC.variance(jnp.zeros(2))
    full = likelihoods.from_log_prob(
        POISSON.log_prob, POISSON.sample, mean=POISSON.mean, variance=POISSON.variance
    )
    outputs = jnp.array([0.3, -0.7])
    np.testing.assert_array_equal(full.mean(outputs), np.exp(outputs))
    np.testing.assert_array_equal(full.variance(outputs), np.exp(outputs))
    np.testing.assert_array_equal(
        full.scale.inverse(full.line(outputs)), full.mean(outputs)
    )


def test_check_compares_the_examples_only():
    assert GENERIC.check(jnp.zeros((4, 7)), np.zeros((4, 2, 2))) is None
    assert GENERIC.check(jnp.zeros((4, 7)), None) is None
    with pytest.raises(ValueError, match=r"\(4, 7\).*\(5,\).*leading"):
        GENERIC.check(jnp.zeros((4, 7)), np.zeros(5))
    with pytest.raises(
        ValueError,
        match="num_samples must be a positive whole number of targets; got 0",
    ):
        likelihoods.from_log_prob(POISSON.log_prob, POISSON.sample, num_samples=0)

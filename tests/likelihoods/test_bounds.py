"""Other roots of every likelihood: unchanged ones, bounds from columns, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax import likelihoods
from together import together

CATEGORICAL, BERNOULLI = likelihoods.categorical(), likelihoods.bernoulli()
LOCATION_SCALE = likelihoods.gaussian_location_scale()
GENERIC = likelihoods.from_log_prob(
    CATEGORICAL.log_prob, CATEGORICAL.sample, num_samples=3
)
KEY = jax.random.PRNGKey(0)
TRANSFORMATIONS = {
    "cholesky": likelihoods.cholesky_root,
    "diagonal": likelihoods.diagonal_root,
    "rank": functools.partial(likelihoods.rank_root, k=1),
    "iterated": functools.partial(likelihoods.rank_root, k=1, num_iterations=2),
}
columns_of = jax.jit(likelihoods.root_columns, static_argnums=0)


def squares(likelihood, outputs, key=None):
    """(n, d, d): L L^T of every example, over its flattened outputs."""
    columns = np.asarray(columns_of(likelihood, outputs, key))
    flat = columns.reshape(*columns.shape[:2], -1)
    return np.einsum("rni,rnj->nij", flat, flat)


def smallest_eigenvalues(matrices):
    return np.linalg.eigvalsh(matrices)[..., 0]


def user_built(likelihood):
    """The same functions, without what only this library's likelihoods tell."""
    return likelihood._replace(
        diagonal=False, cholesky=None, diagonal_bound=None, low_rank=None
    )


# ---- likelihoods with nothing to change


@together
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize(
    "likelihood",
    [
        BERNOULLI,
        likelihoods.gaussian(),
        likelihoods.gaussian(scale=None),
        likelihoods.gamma(shape=None),
        likelihoods.poisson(),
        likelihoods.negative_binomial(2.0),
        likelihoods.student_t(3.0, 1.0),
    ],
    ids=lambda likelihood: likelihood.name,
)
def test_one_output_a_target_is_left_as_it_is(likelihood, name):
    assert TRANSFORMATIONS[name](likelihood) is likelihood


def test_others_that_are_left_as_they_are():
    assert likelihoods.cholesky_root(LOCATION_SCALE) is LOCATION_SCALE
    assert likelihoods.diagonal_root(LOCATION_SCALE) is LOCATION_SCALE
    assert likelihoods.cholesky_root(GENERIC) is GENERIC
    bound = likelihoods.rank_root(CATEGORICAL, 1)
    assert likelihoods.cholesky_root(bound) is bound
    bound = likelihoods.diagonal_root(CATEGORICAL)
    assert likelihoods.diagonal_root(bound) is bound
    assert likelihoods.cholesky_root(bound) is bound


@together
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("likelihood", [CATEGORICAL, GENERIC], ids=["closed", "drawn"])
def test_the_same_call_gives_the_same_object(likelihood, name):
    transform = TRANSFORMATIONS[name]
    found = transform(likelihood)
    assert transform(likelihood) is found
    assert found.log_prob is likelihood.log_prob
    assert found.random_root == likelihood.random_root
    hash(found)


def test_equal_arguments_give_the_same_object():
    rank_root = likelihoods.rank_root
    assert rank_root(CATEGORICAL, 2) is rank_root(CATEGORICAL, k=2, num_iterations=None)
    assert rank_root(CATEGORICAL, 2) is not rank_root(CATEGORICAL, 2, 0)
    assert rank_root(CATEGORICAL, 2) is not rank_root(CATEGORICAL, 1)


def test_the_bounds_of_the_cholesky_root_are_those_of_the_likelihood():
    outputs = np.random.default_rng(0).normal(size=(2, 4))
    cholesky = likelihoods.cholesky_root(CATEGORICAL)
    for name in ("diagonal", "rank"):
        transform = TRANSFORMATIONS[name]
        np.testing.assert_array_equal(
            columns_of(transform(cholesky), outputs),
            columns_of(transform(CATEGORICAL), outputs),
        )


# ---- location and scale


def test_location_and_scale_keep_the_larger_entry():
    outputs = np.array([[[0.3, -1.0], [0.2, 1.0]], [[5.0, 0.1], [0.0, -0.5]]])
    likelihood = likelihoods.rank_root(LOCATION_SCALE, 1)
    assert likelihood.probe_shape(outputs.shape) == (2, 2, 1)
    entries = np.stack([np.exp(-2 * outputs[..., 1]), np.full((2, 2), 2.0)], -1)
    kept = np.where(entries == entries.max(-1, keepdims=True), entries, 0)
    assert sorted(np.argmax(kept, -1).ravel()) == [0, 0, 1, 1]
    found = squares(likelihood, outputs)
    expected = np.eye(4) * kept.reshape(2, 1, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    both = squares(likelihoods.rank_root(LOCATION_SCALE, 2), outputs)
    np.testing.assert_allclose(both, squares(LOCATION_SCALE, outputs), rtol=1e-12)
    narrow = jnp.asarray(outputs, jnp.bfloat16)
    cotangents = jax.eval_shape(likelihood.root, narrow, np.ones((2, 2, 1)))
    assert cotangents.dtype == jnp.bfloat16 and cotangents.shape == (2, 2, 2)


# ---- bounds from the columns of a root


def coupled_log_prob(outputs, targets):
    """Two targets an example that both depend on both outputs."""
    location = outputs[:, :1] + jnp.stack([outputs[:, 1], -2 * outputs[:, 1]], -1)
    return -0.5 * (targets - location) ** 2


def coupled_sample(key, outputs):
    return jax.random.normal(key, outputs.shape, outputs.dtype)


COUPLED = likelihoods.from_log_prob(coupled_log_prob, coupled_sample, num_samples=3)
DRAWN = {
    "targets": (GENERIC, (2, 2, 3), (2, 2, 1)),
    "coupled": (COUPLED, (3, 2), (3, 2, 1)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_bounds_hold_for_every_draw(name):
    likelihood, shape, _ = DRAWN[name]
    outputs = np.random.default_rng(1).normal(size=shape)
    upper = likelihoods.diagonal_root(likelihood)
    lower = likelihoods.rank_root(likelihood, 1)
    assert upper.probe_shape(shape) == shape
    assert lower.probe_shape(shape) == DRAWN[name][2]
    own = likelihood.probe_shape(shape)
    full = likelihoods.rank_root(likelihood, min(own[-1], shape[-1]))

    @jax.jit
    def evaluate(key):
        diagonal = upper.root(outputs, np.ones(shape), key).reshape(shape[0], 1, -1)
        columns = (
            likelihoods.root_columns(root, outputs, key).reshape(-1, shape[0], size)
            for root in (likelihood, lower, full)
        )
        squares = [jnp.einsum("rni,rnj->nij", part, part) for part in columns]
        return [jnp.eye(size)[None] * diagonal**2, *squares]

    size = outputs[0].size
    for seed in range(3):
        above, drawn, below, everything = evaluate(jax.random.PRNGKey(seed))
        assert smallest_eigenvalues(above - drawn).min() >= -1e-13
        assert smallest_eigenvalues(drawn - below).min() >= -1e-13
        # a pivot is explained in full
        captured = np.trace(below, axis1=1, axis2=2)
        assert np.all(captured >= (1 - 1e-13) * np.max(drawn, (1, 2)))
        np.testing.assert_allclose(everything, drawn, atol=1e-13)


def test_the_diagonal_bound_of_drawn_scores_is_the_stated_one():
    outputs = np.random.default_rng(2).normal(size=(2, 2, 3))
    columns = np.abs(columns_of(GENERIC, outputs, KEY))
    expected = np.sum(columns * columns.sum((2, 3), keepdims=True), 0)
    root = jax.jit(likelihoods.diagonal_root(GENERIC).root)
    found = root(outputs, np.ones(outputs.shape), KEY)
    np.testing.assert_allclose(found**2, expected, rtol=1e-12)


def test_random_bounds_need_their_key_and_keep_narrow_outputs():
    outputs = jnp.zeros((2, 3), jnp.bfloat16)
    for name in ("diagonal", "rank"):
        likelihood = TRANSFORMATIONS[name](GENERIC)
        probes = jnp.ones(likelihood.probe_shape(outputs.shape), jnp.bfloat16)
        with pytest.raises(ValueError, match="needs a key"):
            likelihood.root(outputs, probes)
        cotangents = jax.eval_shape(likelihood.root, outputs, probes, KEY)
        assert cotangents.dtype == jnp.bfloat16 and cotangents.shape == (2, 3)


def test_columns_find_the_closed_forms_of_classes():
    """Pivots are the largest p (1 - p), which here are the likeliest classes."""
    outputs = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.5, 0.15, 0.1]]))
    outputs = np.stack([outputs, outputs[::-1]])
    likelihood = user_built(CATEGORICAL)
    for k in (1, 3):
        expected = likelihoods.rank_root(CATEGORICAL, k)
        found = likelihoods.rank_root(likelihood, k)
        assert found.probe_shape(outputs.shape) == expected.probe_shape(outputs.shape)
        np.testing.assert_allclose(
            squares(found, outputs), squares(expected, outputs), atol=1e-14
        )
    upper = squares(likelihoods.diagonal_root(likelihood), outputs)
    assert smallest_eigenvalues(upper - squares(CATEGORICAL, outputs)).min() >= -1e-15
    assert likelihoods.cholesky_root(likelihood) is likelihood


def test_columns_find_a_root_that_is_diagonal():
    outputs = np.array([[0.3, -1.0, 2.0], [0.0, 0.1, -4.0]])
    likelihood = user_built(BERNOULLI)
    upper = likelihoods.diagonal_root(likelihood)
    expected = squares(BERNOULLI, outputs)
    np.testing.assert_allclose(squares(upper, outputs), expected, rtol=1e-12)
    lower = likelihoods.rank_root(likelihood, 2)
    assert lower.probe_shape(outputs.shape) == (2, 2)
    dropped = np.argmax(np.abs(outputs), -1)
    expected[np.arange(2), dropped, dropped] = 0
    np.testing.assert_allclose(squares(lower, outputs), expected, rtol=1e-12)
    alone = likelihoods.rank_root(likelihood, 1)
    assert alone.probe_shape((4,)) == (4, 1)


def test_columns_without_scores_are_zero_and_nan_is_kept():
    lower = likelihoods.rank_root(user_built(CATEGORICAL), 2)
    outputs = jnp.array([[1e4, 0.0, 0.0], [0.0, jnp.nan, 1.0]])
    columns = columns_of(lower, outputs)
    np.testing.assert_array_equal(columns[:, 0], np.zeros((2, 3)))
    assert np.all(np.isnan(columns[:, 1]))


def test_a_dispersion_that_becomes_known_keeps_the_bound():
    def scaled(dispersion):
        def root(outputs, probes, key=None):
            return CATEGORICAL.root(outputs, probes) / jnp.sqrt(dispersion)

        return user_built(CATEGORICAL)._replace(root=root)

    unknown = scaled(1.0)._replace(with_dispersion=scaled)
    outputs = np.random.default_rng(3).normal(size=(2, 3))
    for name in ("diagonal", "rank"):
        bound = TRANSFORMATIONS[name](unknown)
        known = bound.with_dispersion(4.0)
        assert known.probe_shape((2, 3)) == bound.probe_shape((2, 3))
        np.testing.assert_allclose(
            4 * squares(known, outputs), squares(bound, outputs), rtol=1e-12
        )


# ---- errors


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "2", None])
def test_rank_must_be_a_positive_whole_number(k):
    likelihoods.rank_root(CATEGORICAL, 2)  # an equal key in the cache
    with pytest.raises(
        ValueError, match=r"k must be a positive whole number; got"
    ) as e:
        likelihoods.rank_root(CATEGORICAL, k)
    assert repr(k) in str(e.value)


@pytest.mark.parametrize("num_iterations", [-1, 3.0, True])
def test_iterations_must_be_a_whole_number(num_iterations):
    with pytest.raises(
        ValueError, match=r"num_iterations must be a whole number, at least 0; got"
    ) as e:
        likelihoods.rank_root(CATEGORICAL, 2, num_iterations)
    assert repr(num_iterations) in str(e.value)


@pytest.mark.parametrize("num_iterations", [None, 3])
def test_rank_beyond_that_of_the_classes(num_iterations):
    likelihood = likelihoods.rank_root(CATEGORICAL, 3, num_iterations)
    rule = "k = 3 for C = 3 classes.*k is at most C - 1"
    with pytest.raises(ValueError, match=rule):
        likelihood.probe_shape((5, 3))
    with pytest.raises(ValueError, match=rule):
        jax.eval_shape(likelihood.root, jnp.zeros((5, 3)), jnp.zeros((5, 3)))
    assert likelihood.probe_shape((5, 4)) == (5, 3)


def test_rank_beyond_that_of_the_other_likelihoods():
    with pytest.raises(ValueError, match="k = 2, but bernoulli has one output"):
        likelihoods.rank_root(BERNOULLI, 2)
    with pytest.raises(ValueError, match=r"k = 3.*at most 2"):
        likelihoods.rank_root(LOCATION_SCALE, 3).probe_shape((4, 2))
    likelihood = likelihoods.rank_root(GENERIC, 4)
    for shape, rank in (((5, 7), 3), ((5, 2), 2)):  # samples, outputs
        with pytest.raises(ValueError, match=f"k = 4.*at most {rank}"):
            likelihood.root(jnp.zeros(shape), jnp.zeros((5, 4)), KEY)

"""Draws: their distribution, their shapes, their keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff
import structure_cases as cases
from structure_cases import SIZE, STRUCTURES

MEAN = np.linspace(-1.0, 2.0, SIZE)
DRAWS = 8000
# With fixed seeds these tests pass or fail for ever; a right sampler fails one of them
# with this probability over the choice of the seed.
RISK = 1e-4

BY_NAME = {case.name: case for case in STRUCTURES}
sample = jax.jit(ff.sample, static_argnums=2)


def draw(state, seed, shape):
    return sample(state, jax.random.key(seed), shape)


def matrix_of(draws):
    """A tree of draws as `(number, d)`, in the order of the parameters."""
    parts = [np.asarray(x).reshape((len(x), -1)) for x in jax.tree.leaves(draws)]
    return np.concatenate(parts, 1)


@functools.cache
def information(name):
    return cases.information(BY_NAME[name])


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "name", ["scalar", "diagonal", "block-names", "full", "low_rank-4"]
)
def test_mean_and_covariance(belief, name):
    state = belief(cases.tree(MEAN), information(name))
    draws = matrix_of(draw(state, 3, (DRAWS,))) - MEAN
    # whitened by the true covariance: independent standard normal
    white = draws @ np.linalg.cholesky(cases.matrix(BY_NAME[name]))
    distance = DRAWS * np.sum(white.mean(0) ** 2)
    assert stats.chi2.sf(distance, SIZE) > RISK
    # Wishart: off the diagonal variance 1 / DRAWS, on it 2 / DRAWS
    error = white.T @ white / DRAWS - np.eye(SIZE)
    off = np.sum(np.triu(error, 1) ** 2)
    distance = DRAWS * (off + np.sum(np.diag(error) ** 2) / 2)
    assert stats.chi2.sf(distance, SIZE * (SIZE + 1) / 2) > RISK
    assert stats.kstest(white[:, 0], stats.norm.cdf).pvalue > RISK


def test_unknown_dispersion_gives_a_multivariate_t(belief):
    name, df, dispersion = "full", 3.5, 2.0
    state = belief(
        cases.tree(MEAN),
        information(name),
        dispersion=jnp.asarray(dispersion),
        degrees_of_freedom=jnp.asarray(df),
        count=jnp.asarray(20.0),
    )
    draws = matrix_of(draw(state, 5, (DRAWS,))) - MEAN
    matrix = cases.matrix(BY_NAME[name])
    error = np.sqrt(dispersion * np.diag(np.linalg.inv(matrix)))
    for index in (0, 7, 14):
        marginal = stats.kstest(draws[:, index] / error[index], stats.t(df).cdf)
        assert marginal.pvalue > RISK
    # one chi-square for all parameters: the squared length is F, not a sum of squared
    # independent t
    radius = np.einsum("ni,ij,nj->n", draws, matrix, draws) / (SIZE * dispersion)
    assert stats.kstest(radius, stats.f(SIZE, df).cdf).pvalue > RISK


def test_bank_is_a_mixture(belief):
    means, variances = np.array([-2.0, 0.0, 3.0]), np.array([0.25, 1.0, 4.0])
    weights = np.array([0.5, 0.2, 0.3])
    members = tuple(
        belief(jnp.full(2, m), ff.structures.Diagonal(jnp.full(2, 1 / v)))
        for m, v in zip(means, variances, strict=True)
    )
    bank = ff.BankState(members, jnp.log(weights))
    draws = np.asarray(draw(bank, 11, (DRAWS,)))

    def cdf(x):
        return stats.norm.cdf((x[:, None] - means) / np.sqrt(variances)) @ weights

    assert stats.kstest(draws[:, 0], cdf).pvalue > RISK
    # one member for all parameters: they are correlated through it
    expected = weights @ (means - weights @ means) ** 2
    spread = np.std(np.prod(draws - draws.mean(0), 1)) / np.sqrt(DRAWS)
    assert abs(np.cov(draws.T)[0, 1] - expected) < 4 * spread


@pytest.fixture
def state(belief):
    return belief(cases.tree(MEAN), information("diagonal"))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes(state, shape):
    draws = draw(state, 0, shape)
    expected = jax.tree.map(lambda x: (*shape, *x.shape), state.mean)
    assert jax.tree.map(jnp.shape, draws) == expected
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(draws)])
    assert len(np.unique(flat)) == flat.size  # no two draws the same


@pytest.mark.slow
def test_keys_int_typed_and_data(state):
    first = draw(state, 7, (2,))
    typed = jax.random.key(7)
    data = jax.random.key_data(typed)
    for key in (7, np.int64(7), typed, data, np.asarray(data)):
        other = ff.sample(state, key, (2,))
        np.testing.assert_allclose(matrix_of(other), matrix_of(first), rtol=1e-14)
    for key in (typed, data):  # the same program, to the bit
        other = sample(state, key, (2,))
        np.testing.assert_array_equal(matrix_of(other), matrix_of(first))
    assert np.all(matrix_of(draw(state, 8, (2,))) != matrix_of(first))


def test_other_generators(state):
    key = jax.random.key(0, impl="rbg")
    assert np.all(np.isfinite(matrix_of(ff.sample(state, key, (2,)))))


@pytest.mark.parametrize("key", [None, 1.5, jnp.zeros(2)])
def test_wrong_keys(state, key):
    with pytest.raises(ValueError, match="key"):
        ff.sample(state, key)


def test_too_few_observations(state):
    unknown = state._replace(
        dispersion=jnp.asarray(jnp.nan),
        degrees_of_freedom=jnp.asarray(-1.0),
        count=jnp.asarray(14.0),
    )
    with pytest.raises(ValueError, match="14 observations leave no degree of freedom"):
        ff.sample(unknown, 0)


def test_vmap_over_states(state):
    other = state._replace(mean=jax.tree.map(lambda x: x + 1, state.mean))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), state, other)
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.vmap(lambda s, k: sample(s, k, (3,)))(stacked, keys)
    for index, one in enumerate((state, other)):
        row = jax.tree.map(lambda x, i=index: x[i], together)
        alone = matrix_of(sample(one, keys[index], (3,)))
        np.testing.assert_allclose(matrix_of(row), alone, rtol=1e-12)


def test_float32(state):
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), state)
    draws = draw(narrow, 0, (2,))
    assert {x.dtype for x in jax.tree.leaves(draws)} == {jnp.dtype("float32")}

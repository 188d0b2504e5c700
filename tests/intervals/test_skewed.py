"""Posterior quantiles and skew-modal draws, against importance sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import firth
import fisherflow_jax as ff

MODEL = firth.MODEL
X, Y = firth.rows(100, np.array([-1.0, 1.0, -0.5]), seed=3)
LEVELS = np.array([0.025, 0.975])


def log_likelihood(theta):
    return jnp.sum(Y * (X @ theta) - jnp.logaddexp(0.0, X @ theta))


@pytest.fixture(scope="module")
def state():
    flow = ff.fisher_flow(*MODEL, prior_precision=0.1)
    return ff.warm_start(flow, flow.init(np.zeros(3)), (X, Y))


@pytest.fixture(scope="module")
def posterior(state):
    """Draws of a wider t, and their weights: the exact posterior."""
    rng, mode = np.random.default_rng(0), np.asarray(state.mean)
    covariance = np.linalg.inv(ff.information.to_dense(state.information))
    z, c = rng.normal(size=(200_000, 3)), rng.chisquare(5, 200_000) / 5
    z = z / np.sqrt(c)[:, None]
    draws = mode + 1.15 * z @ np.linalg.cholesky(covariance).T
    eta = draws @ X.T
    logs = eta @ Y - np.logaddexp(0, eta).sum(1) - 0.05 * np.sum(draws**2, 1)
    logs += 4 * np.log1p(np.sum(z**2, 1) / 5)
    weights = np.exp(logs - logs.max())
    return draws, weights / weights.sum()


def quantiles(draws, weights):
    order = np.argsort(draws)
    return np.interp(LEVELS, np.cumsum(weights[order]), draws[order])


@pytest.mark.parametrize("entry", range(3))
def test_quantiles_are_those_of_the_posterior(state, posterior, entry):
    draws, weights = posterior
    exact = quantiles(draws[:, entry], weights)
    found = ff.intervals.skewed(state, *MODEL, (X, Y), f"theta[{entry}]")
    error = float(found.standard_error)
    off = (np.array([found.lower, found.upper]) - exact) / error
    assert np.abs(off).max() < 0.12
    mean = weights @ draws[:, entry]
    assert abs(found.estimate - mean) < 0.03 * error
    wide = (draws[:, entry] - mean) / np.sqrt(weights @ (draws[:, entry] - mean) ** 2)
    assert abs(found.skewness - weights @ wide**3) < 0.05
    if entry == 1:  # where Laplace's are off by more
        lower, upper = ff.confidence_interval(state)
        laplace = (np.array([lower[1], upper[1]]) - exact) / error
        assert np.abs(laplace).max() > 0.3


def test_by_whole_arrays_of_derivatives_and_however_rows_come(state):
    contrast = np.array([0.5, -1.0, 0.0])
    inverse = np.linalg.inv(ff.information.to_dense(state.information))
    error = np.sqrt(contrast @ inverse @ contrast)
    along = inverse @ contrast / error
    thirds = jax.jit(jax.jacfwd(jax.hessian(log_likelihood)))(state.mean)
    skewness = np.einsum("ijk,i,j,k", thirds, along, along, along)
    shift = 0.5 * np.einsum("ijk,i,jk", thirds, along, inverse)
    weights = np.ones(100)
    halves = [(X[:70], Y[:70]), (X[70:], Y[70:], weights[70:])]
    for data in ((X, Y), halves, iter(halves), ff.Stacked(X[None], Y[None])):
        found = ff.intervals.skewed(state, *MODEL, data, contrast)
        np.testing.assert_allclose(found.skewness, skewness, rtol=1e-9)
        np.testing.assert_allclose(found.standard_error, error, rtol=1e-9)
        mean = contrast @ state.mean + error * shift
        np.testing.assert_allclose(found.estimate, mean, rtol=1e-9)


def test_a_posterior_of_any_structure_and_its_temperature(state):
    information = ff.structures.Diagonal(jnp.array([9.0, 4.0, 1.0]))
    cold = ff.posterior(
        jnp.asarray(state.mean), information, prior_precision=1.0, temperature=0.25
    )
    found = ff.intervals.skewed(cold, *MODEL, (X, Y))
    thirds = jax.jit(jax.jacfwd(jax.hessian(log_likelihood)))(state.mean)
    errors = np.sqrt(0.25 / np.array([10.0, 5.0, 2.0]))
    own = np.einsum("iii->i", thirds) * errors**3 / 0.25
    np.testing.assert_allclose(found.standard_error, errors, rtol=1e-9)
    np.testing.assert_allclose(found.skewness, own, rtol=1e-9)
    pull = 0.5 * np.einsum("ijk,jk->i", thirds, np.diag(errors**2)) / 0.25
    mean = state.mean + errors**2 * pull
    np.testing.assert_allclose(found.estimate, mean, rtol=1e-9)


def test_a_normal_likelihood_gives_the_intervals_of_the_state():
    flow = ff.fisher_flow(MODEL[0], ff.likelihoods.gaussian(2.0))
    state, _ = flow.update(flow.init(np.zeros(3)), (X, Y))
    found = ff.intervals.skewed(state, MODEL[0], ff.likelihoods.gaussian(2.0), [(X, Y)])
    lower, upper = ff.confidence_interval(state)
    np.testing.assert_allclose(found.lower, lower, rtol=1e-9)
    np.testing.assert_allclose(found.upper, upper, rtol=1e-9)


def test_an_expansion_that_does_not_rise_has_no_ends():
    model = (lambda theta, x: x * theta), ff.likelihoods.poisson()
    state = ff.posterior(
        jnp.array(2.0), ff.structures.Full(jnp.array([0.5])), prior_precision=0.1
    )
    found = ff.intervals.skewed(state, *model, (np.ones(2), np.ones(2)))
    assert abs(found.skewness) > 2 and np.isnan(found.lower) and np.isnan(found.upper)


def test_draws_are_turned_to_the_heavier_side_and_keep_even_moments(state, posterior):
    sample = jax.jit(ff.sample, static_argnums=2, static_argnames="log_density")
    draws = sample(state, jax.random.key(1), (50_000,), log_density=log_likelihood)
    mode = np.asarray(state.mean)
    ways = np.asarray(draws) - mode
    inverse = np.linalg.inv(ff.information.to_dense(state.information))
    # E h h' is V whatever is turned round: the standard error is sqrt(2 / n)
    found = np.einsum("ni,nj->ij", ways, ways) / len(ways)
    scale = np.sqrt(np.diag(inverse))
    np.testing.assert_allclose(
        (found - inverse) / np.outer(scale, scale), 0, atol=5 * np.sqrt(2 / 50_000)
    )
    exact, weights = posterior
    mean = weights @ (exact - mode)
    error = np.abs(ways.mean(0) - mean) / scale
    assert error.max() < 0.06 < 0.15 < np.abs(mean / scale).max()
    off = (np.quantile(draws[:, 1], LEVELS) - quantiles(exact[:, 1], weights)) / scale[
        1
    ]
    assert np.abs(off).max() < 0.26


@pytest.mark.slow
def test_draws_of_a_quadratic_are_as_often_on_either_side_and_others_are_refused(state):
    def quadratic(theta):
        return -jnp.sum(jnp.square(theta))

    draws = ff.sample(state, 0, (4000,), log_density=quadratic)
    share = np.mean(np.asarray(draws) > np.asarray(state.mean), 0)
    np.testing.assert_allclose(share, 0.5, atol=5 * 0.5 / np.sqrt(4000))
    with pytest.raises(ValueError, match="to a number"):
        ff.sample(state, 0, log_density=lambda theta: theta)
    with pytest.raises(TypeError, match="mixture"):
        ff.sample([state, state], 0, log_density=quadratic)
    flow = ff.fisher_flow(MODEL[0], ff.likelihoods.gaussian(scale=None))
    other, _ = flow.update(flow.init(np.zeros(3)), (X, Y))
    with pytest.raises(ValueError, match="Student's t"):
        ff.sample(other, 0, log_density=quadratic)
    with pytest.raises(ValueError, match="estimates a dispersion"):
        ff.intervals.skewed(other, *MODEL, (X, Y))

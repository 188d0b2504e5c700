"""Metrics, pullbacks and Jeffreys' prior against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import fisherflow_jax as ff

geo, likelihoods = ff.geometry, ff.likelihoods
RNG = np.random.default_rng(0)
X = np.column_stack([np.ones(40), RNG.normal(size=(40, 2))])
ROWS = (jnp.asarray(X), None)


def linear(params, inputs):
    return inputs @ params


@functools.cache
def logistic(structure=ff.structures.full()):  # noqa: B008
    model = linear, likelihoods.bernoulli()
    return geo.metric(ff.estimators.exact(*model, structure), ROWS)


def test_of_a_model_and_of_its_outputs():
    params = jnp.array([0.3, -1.0, 0.5])
    p = expit(X @ params)
    expected = (X.T * (p * (1 - p))) @ X
    np.testing.assert_allclose(jax.jit(logistic())(params), expected, rtol=1e-12)
    diagonal = logistic(ff.structures.diagonal())(params)
    np.testing.assert_allclose(diagonal, np.diag(np.diag(expected)), rtol=1e-12)
    outputs = geo.metric(likelihoods.categorical())
    z = jnp.array([0.2, -1.0, 0.4])
    p = jax.nn.softmax(z)
    expected = jnp.diag(p) - jnp.outer(p, p)
    np.testing.assert_allclose(jax.jit(outputs)(z), expected, atol=1e-15)


def test_parameters_are_any_tree():
    def apply_fn(params, inputs):
        return inputs @ params["w"] + params["b"]

    params = {"b": jnp.array(0.3), "w": jnp.array([-1.0, 0.5])}
    model = apply_fn, likelihoods.bernoulli()
    estimator = ff.estimators.exact(*model, ff.structures.full())
    metric = geo.metric(estimator, (jnp.asarray(X[:, 1:]), None))
    expected = logistic()(jnp.array([0.3, -1.0, 0.5]))
    np.testing.assert_allclose(metric(params), expected, rtol=1e-12)
    halved = geo.pullback(metric, lambda p: jax.tree.map(lambda x: x / 2, p))
    doubled = jax.tree.map(lambda x: 2 * x, params)
    np.testing.assert_allclose(halved(doubled), expected / 4, rtol=1e-12)
    log_prior = geo.jeffreys(metric)(params)
    np.testing.assert_allclose(log_prior, 0.5 * np.linalg.slogdet(expected)[1])


def test_pullback():
    chances = geo.pullback(geo.metric(likelihoods.bernoulli()), jax.scipy.special.logit)
    p = jnp.linspace(0.05, 0.95, 7)
    found = jax.jit(jax.vmap(chances))(p)[:, 0, 0]
    np.testing.assert_allclose(found, 1 / (p * (1 - p)), rtol=1e-12)
    # a curve in the normal family: m = 3 t, log scale = t
    curve = geo.pullback(
        geo.metric(likelihoods.gaussian_location_scale()),
        lambda t: jnp.stack([3 * t, t]),
    )
    np.testing.assert_allclose(curve(jnp.array(0.7)), [[9 * np.exp(-1.4) + 2]])


@pytest.mark.slow
def test_jeffreys_prior():
    params, metric = jnp.array([0.3, -1.0, 0.5]), logistic()
    log_prior = geo.jeffreys(metric)
    expected = 0.5 * np.linalg.slogdet(metric(params))[1]
    np.testing.assert_allclose(jax.jit(log_prior)(params), expected, rtol=1e-12)
    # Firth's score: half the trace of I^-1 dI
    moved = np.asarray(jax.jacfwd(metric)(params))
    expected = 0.5 * np.einsum("ij,jik->k", np.linalg.inv(metric(params)), moved)
    np.testing.assert_allclose(jax.grad(log_prior)(params), expected, rtol=1e-10)
    # it is a density: in other coordinates, times the determinant of the map
    turn = jnp.asarray(RNG.normal(size=(3, 3)))
    other = geo.jeffreys(geo.pullback(metric, lambda phi: turn @ phi))
    found = other(jnp.linalg.solve(turn, params))
    expected = log_prior(params) + np.linalg.slogdet(turn)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.slow
def test_fisher_volumes():
    """Bernoulli: pi, in the coordinate where it is flat; exponential: log 100."""
    x, weights = np.polynomial.legendre.leggauss(40)
    angle = jnp.asarray(np.pi / 4 * (x + 1))
    bernoulli = geo.metric(likelihoods.bernoulli())
    flat = geo.pullback(bernoulli, lambda a: jax.scipy.special.logit(jnp.sin(a) ** 2))
    density = jnp.exp(jax.vmap(geo.jeffreys(flat))(angle))
    np.testing.assert_allclose(density @ weights * np.pi / 4, np.pi, rtol=1e-12)
    rate = jnp.asarray(4.95 * (x + 1) + 0.1)
    rates = geo.pullback(geo.metric(likelihoods.gamma()), lambda r: -jnp.log(r))
    density = jnp.exp(jax.vmap(geo.jeffreys(rates))(rate))
    np.testing.assert_allclose(density @ weights * 4.95, np.log(100), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_singular_information_is_named(dtype):
    x = np.column_stack([X[:, 1], X[:, 1], 1e-3 * X[:, 2]])
    model = lambda p, x: x @ p["w"], likelihoods.bernoulli()
    estimator = ff.estimators.exact(*model, ff.structures.full())
    log_prior = geo.jeffreys(geo.metric(estimator, (jnp.asarray(x, dtype), None)))
    params = {"w": jnp.array([0.1, 0.2, 0.3], dtype)}
    with pytest.raises(ValueError, match=r"along \+1 w\[0\] -1 w\[1\]:"):
        log_prior(params)
    assert jnp.isnan(jax.jit(log_prior)(params))


def test_what_is_no_metric():
    with pytest.raises(TypeError, match="bound to a model"):
        geo.metric(ff.estimators.exact, ROWS)
    with pytest.raises(ValueError, match="must be real floating-point"):
        geo.pullback(logistic(), lambda p: p)(jnp.array([1, 2, 3]))


def test_the_directions_are_named_where_it_is_differentiated():
    singular = geo.jeffreys(lambda p: jnp.outer(p, p))
    with pytest.raises(ValueError, match=r"along \+1 theta\[0\] -1 theta\[1\]"):
        jax.grad(singular)(jnp.ones(2))


@pytest.mark.parametrize(
    "use",
    [
        geo.jeffreys,
        lambda metric: geo.pullback(metric, jnp.log),
        lambda metric: geo.length(metric, jnp.ones((2, 1))),
        lambda metric: geo.acceleration(metric, jnp.ones(1), jnp.ones(1)),
        lambda metric: geo.exp(metric, jnp.ones(1), jnp.ones(1)),
        lambda metric: geo.log(metric, jnp.ones(1), jnp.ones(1)),
        lambda metric: geo.distance(metric, jnp.ones(1), jnp.ones(1)),
    ],
)
def test_a_metric_is_a_function_of_the_parameters(use):
    model = linear, likelihoods.bernoulli()
    estimator = ff.estimators.exact(*model, ff.structures.full())
    with pytest.raises(TypeError, match=r"a metric is a function, params -> \(d, d\)"):
        use(estimator)


def test_whole_numbers_are_no_outputs():
    """Their root would be rounded to whole numbers."""
    with pytest.raises(ValueError, match="must be real floating-point"):
        geo.metric(likelihoods.poisson())(jnp.array(1))

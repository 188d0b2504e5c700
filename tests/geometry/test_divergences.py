"""Eguchi's geometry, Pythagoras, and the divergences against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as nd
import pytest
from numpyro.distributions import kl_divergence

import fisherflow_jax as ff

geo, likelihoods = ff.geometry, ff.likelihoods
SCALE = 0.8


def of_normals(function):
    """The divergence of normals whose mean and scale are functions of parameters."""
    return lambda x, y: kl_divergence(nd.Normal(*function(x)), nd.Normal(*function(y)))


def by_natural(eta):
    return -eta[0] / (2 * eta[1]), jnp.sqrt(-0.5 / eta[1])


def by_moments(moments):
    return moments[0], jnp.sqrt(moments[1] - moments[0] ** 2)


def christoffel(metric, x):
    """Of the first kind, [i, j, l], by the metric's derivatives."""
    d = jax.jacfwd(metric)(x)
    return 0.5 * (d.transpose(2, 0, 1) + d.transpose(0, 2, 1) - d)


@pytest.mark.slow
def test_eguchi_on_the_normal():
    found = geo.from_divergence(of_normals(lambda x: (x[0], x[1])))
    x = jnp.array([0.3, SCALE])
    metric = found.metric(x)
    np.testing.assert_allclose(metric, np.diag([1, 2]) / SCALE**2, atol=1e-10)
    skewness = jax.jit(found.skewness)(x) * SCALE**3
    expected = np.zeros((2, 2, 2))
    expected[0, 0, 1] = expected[0, 1, 0] = expected[1, 0, 0] = 2
    expected[1, 1, 1] = 8
    np.testing.assert_allclose(skewness, expected, atol=1e-10)
    both = 0.5 * (found.mixture(x) + found.exponential(x))
    np.testing.assert_allclose(both, christoffel(found.metric, x), atol=1e-10)


def test_flat_connections():
    natural = jnp.array([0.3 / SCALE**2, -0.5 / SCALE**2])
    moments = jnp.array([0.3, SCALE**2 + 0.3**2])
    e_flat = geo.from_divergence(of_normals(by_natural))
    m_flat = geo.from_divergence(of_normals(by_moments))
    np.testing.assert_allclose(e_flat.exponential(natural), 0, atol=1e-10)
    np.testing.assert_allclose(m_flat.mixture(moments), 0, atol=1e-10)
    assert jnp.max(jnp.abs(e_flat.mixture(natural))) > 0.1
    assert jnp.max(jnp.abs(m_flat.exponential(moments))) > 0.1


def test_a_likelihood_makes_its_own_geometry():
    """The divergence's metric is the root's; a tree of parameters is ravelled."""
    likelihood = likelihoods.gaussian_location_scale()

    def divergence(x, y):
        first, second = (jnp.stack([v["m"], v["s"]])[None] for v in (x, y))
        return geo.kl(likelihood, first, second)[0]

    params = {"m": jnp.array(0.3), "s": jnp.log(SCALE)}
    found = jax.vmap(geo.from_divergence(divergence).metric)(
        jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    )
    own = geo.metric(likelihood)(jnp.array([0.3, jnp.log(SCALE)]))
    np.testing.assert_allclose(found[0], own, atol=1e-12)


def test_pythagoras():
    """KL(p, r) = KL(p, q) + KL(q, r): q the normal of the moments of a gamma p."""
    shape, rate = 2.5, 1.7
    p, mean, variance = nd.Gamma(shape, rate), shape / rate, shape / rate**2
    q, r = nd.Normal(mean, variance**0.5), nd.Normal(-0.4, 2.2)

    def log_ratio(other):  # E_p log p - E_p log other: other's log is quadratic
        second = variance + (mean - other.loc) ** 2
        cross = -0.5 * second / other.scale**2 - jnp.log(other.scale)
        return -p.entropy() - cross + 0.5 * np.log(2 * np.pi)

    direct = kl_divergence(q, r)
    np.testing.assert_allclose(log_ratio(r) - log_ratio(q), direct, atol=1e-10)
    given = [jnp.array([[d.loc, jnp.log(d.scale)]]) for d in (q, r)]
    found = geo.kl(likelihoods.gaussian_location_scale(), *given)
    np.testing.assert_allclose(log_ratio(q) + found[0], log_ratio(r), atol=1e-10)


def test_fisher_divergence():
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    points = jnp.stack(jnp.meshgrid(jnp.asarray(nodes), jnp.asarray(nodes)), -1)
    weights = jnp.outer(*2 * [jnp.asarray(weights)]).ravel()
    rng = np.random.default_rng(0)
    precision = jnp.asarray(np.array([[1.5, 0.4], [0.4, 0.7]]))
    mean = jnp.asarray(rng.normal(size=2))

    def log_p(x):
        return -0.5 * x @ x

    def log_q(x):
        return -0.5 * (x - mean) @ precision @ (x - mean)

    gap = precision - np.eye(2)
    expected = jnp.sum((precision @ mean) ** 2) + jnp.sum(gap**2)
    points = points.reshape(-1, 2)
    found = geo.fisher_divergence(log_p, log_q, points, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    # draws, within 5 standard errors of their mean
    draws = jnp.asarray(rng.normal(size=(4000, 2)))
    each = jax.vmap(lambda x: jnp.sum((gap @ x - precision @ mean) ** 2))(draws)
    found = geo.fisher_divergence(log_p, log_q, draws)
    assert abs(found - expected) < 5 * each.std() / 4000**0.5


def test_no_closed_form():
    own = likelihoods.from_log_prob(
        lambda z, y: -jnp.abs(y - z), lambda key, z: jax.random.laplace(key, z.shape)
    )
    with pytest.raises(ValueError, match=r"_replace\(kl="):
        geo.kl(own, jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        geo.kl(likelihoods.poisson(), jnp.zeros(3), jnp.ones(2))
    with pytest.raises(ValueError, match="concentration of negative_binomial"):
        geo.kl(likelihoods.negative_binomial(None), jnp.zeros(3), jnp.ones(3))


def test_weights_are_one_for_each_point():
    square = lambda x: -x @ x  # noqa: E731
    with pytest.raises(ValueError, match="weights are one for each point"):
        geo.fisher_divergence(square, square, jnp.ones((4, 3)), jnp.ones(3))

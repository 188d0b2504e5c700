"""Kullback-Leibler divergences of every family against its own expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as nd
import pytest
import scipy.integrate
import scipy.stats

import fisherflow_jax as ff
from fisherflow_jax import likelihoods


@pytest.mark.slow_cases
def test_divergence_is_an_expectation(case):
    outputs, rng = case.outputs, np.random.default_rng(0)
    other = outputs + 0.5 * rng.normal(size=outputs.shape)
    found = jax.jit(case.likelihood.kl)(outputs, other)
    expected = []
    for z, moved in zip(outputs, other, strict=True):
        targets, weights = case.nodes(z)
        first, second = (
            case.log_prob(np.stack([v] * len(targets)), targets) for v in (z, moved)
        )
        here = weights > 1e-200  # what never happens has no logarithm
        expected.append(np.sum((weights * (first - second))[here]))
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    np.testing.assert_allclose(case.likelihood.kl(outputs, outputs), 0, atol=1e-13)


@pytest.mark.slow_cases
def test_divergence_curves_as_the_information(case):
    """The second derivative in the second argument is the output information."""
    z = jnp.asarray(case.outputs)
    columns = likelihoods.root_columns(case.likelihood, z)
    columns = columns.reshape(len(columns), len(z), -1)
    own = jnp.einsum("rni,rnj->nij", columns, columns)

    def one(row):
        return jax.hessian(
            lambda x: case.likelihood.kl(row[None], x[None])[0]
        )(row).reshape(own.shape[1:])  # fmt: skip

    found = jax.jit(jax.vmap(one))(z)
    np.testing.assert_allclose(found, own, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("moved", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("df", [1.0, 2.5, 40.0])
def test_student_t(df, moved):
    found = likelihoods.student_t(df, 2.0).kl(jnp.zeros(1), jnp.array([2.0 * moved]))
    angle = np.arctan(-moved / df**0.5)

    def integrand(a):
        ratio = 2 * moved / df**0.5 * np.sin(a) * np.cos(a)
        weight = np.cos(a) ** (df - 1)
        return weight * np.log1p(ratio + moved**2 / df * np.cos(a) ** 2)

    def weight(a):
        return np.cos(a) ** (df - 1)

    half = np.pi / 2
    top = scipy.integrate.quad(integrand, -half, half, points=[angle], limit=400)[0]
    whole = scipy.integrate.quad(weight, -half, half)[0]
    np.testing.assert_allclose(found[0], 0.5 * (df + 1) * top / whole, rtol=2e-8)
    if df == 1:
        np.testing.assert_allclose(found[0], np.log1p(moved**2 / 4), rtol=2e-8)


def normal_kl(mean, covariance, other, noise):
    """In the words of the textbook."""
    inverse = np.linalg.inv(noise)
    logs = np.linalg.slogdet(noise)[1] - np.linalg.slogdet(covariance)[1]
    gap = other - mean
    return 0.5 * (np.trace(inverse @ covariance) + gap @ inverse @ gap - 2 + logs)


def test_normals_of_known_noise():
    rng = np.random.default_rng(1)
    mean, other = rng.normal(size=(2, 3, 2))
    roots = rng.normal(size=(2, 3, 2, 4))
    noise = np.einsum("...ij,...kj->...ik", roots, roots)
    given = likelihoods.gaussian(covariance="given")
    pair = [
        jnp.concatenate([m, r.reshape(3, 4)], -1)
        for m, r in zip((mean, other), noise, strict=True)
    ]
    expected = [
        normal_kl(*of) for of in zip(mean, noise[0], other, noise[1], strict=True)
    ]
    np.testing.assert_allclose(given.kl(*pair), expected, rtol=1e-10)
    together = likelihoods.gaussian(covariance=noise[0, 0])
    alike = noise[0, 0]
    pairs = zip(mean, other, strict=True)
    expected = [normal_kl(m, alike, o, alike) for m, o in pairs]
    np.testing.assert_allclose(together.kl(mean, other), expected, rtol=1e-10)
    # a target that is missing tells nothing of the two
    used = jnp.array([[1.0, 0.0]] * 3)
    alone = likelihoods.gaussian(scale=noise[0, 0, 0, 0] ** 0.5)
    expected = alone.kl(mean[:, 0], other[:, 0])
    np.testing.assert_allclose(
        together.observing(used).kl(mean, other), expected, rtol=1e-10
    )
    scales = np.array([0.5, 2.0, 1.0])
    given = likelihoods.gaussian(scale="given")
    pair = [
        jnp.stack([m[:, 0], s], -1) for m, s in ((mean, scales), (other, 2 * scales))
    ]
    expected = [
        np.log(2) + (1 + gap**2) / 8 - 0.5
        for gap in (other[:, 0] - mean[:, 0]) / scales
    ]
    np.testing.assert_allclose(given.kl(*pair), expected, rtol=1e-10)


def test_dispersion_divides():
    z, other = jnp.array([0.3, -1.0]), jnp.array([0.5, 0.2])
    for family in (
        likelihoods.poisson,
        likelihoods.bernoulli,
        lambda phi: likelihoods.negative_binomial(2.0, phi),
    ):
        expected = family(1.0).kl(z, other)
        np.testing.assert_allclose(family(2.5).kl(z, other), expected / 2.5, rtol=1e-12)
        np.testing.assert_allclose(family(None).kl(z, other), expected, rtol=1e-12)


DISTRIBUTIONS = {  # a distribution's own divergence, a sum, a quadrature
    "divergence": (
        likelihoods.from_distribution(lambda z: nd.Normal(z[0], jnp.exp(z[1]))),
        likelihoods.gaussian_location_scale(),
    ),
    "sum": (
        likelihoods.from_distribution(lambda z: nd.Poisson(jnp.exp(z))),
        likelihoods.poisson(),
    ),
    "quantiles": (
        likelihoods.from_distribution(
            lambda z: nd.Normal(z[0], jnp.exp(z[1])), ff.expectations.quantiles(100)
        ),
        likelihoods.gaussian_location_scale(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_of_a_distribution(name):
    own, closed = DISTRIBUTIONS[name]
    shape = (4,) if name == "sum" else (4, 2)
    z, other = np.random.default_rng(5).normal(size=(2, *shape))
    expected = closed.kl(z, other)
    np.testing.assert_allclose(jax.jit(own.kl)(z, other), expected, rtol=1e-8)
    slopes = [
        jax.grad(lambda z, of=of: of.kl(jnp.asarray(z), other).sum())(z)
        for of in (own, closed)
    ]
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-6, atol=1e-8)


def test_drawn_targets_give_none():
    drawn = likelihoods.from_distribution(
        lambda z: nd.Normal(z, 1.0), ff.expectations.draws(10)
    )
    assert drawn.kl is None

"""Likelihoods of unknown dispersion: gaussian(scale=None), gamma(shape=None), quasi."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fisherflow_jax import likelihoods

OUTPUTS = np.array([-0.5, 0.2, 1.1])
TARGETS = np.array([0.3, 1.4, 2.2])

UNKNOWN = {
    "gaussian": (
        likelihoods.gaussian(scale=None),
        lambda dispersion: likelihoods.gaussian(scale=float(np.sqrt(dispersion))),
        lambda mean: np.ones_like(mean),
    ),
    "gamma": (
        likelihoods.gamma(shape=None),
        lambda dispersion: likelihoods.gamma(shape=1 / dispersion),
        lambda mean: mean**2,
    ),
}
COUNTS, SHARES = np.array([0.0, 1.0, 4.0]), np.array([0.0, 0.3, 1.0])
# with log p(y | mean = y), from scipy
QUASI = {
    "poisson": (
        likelihoods.poisson(dispersion=None),
        likelihoods.poisson,
        lambda mean: mean,
        COUNTS,
        lambda y: scipy.stats.poisson.logpmf(y, y),
    ),
    "bernoulli": (
        likelihoods.bernoulli(dispersion=None),
        likelihoods.bernoulli,
        lambda mean: mean * (1 - mean),
        SHARES,
        lambda y: -scipy.stats.bernoulli(y).entropy(),
    ),
    "negative_binomial": (
        likelihoods.negative_binomial(2.0, dispersion=None),
        lambda dispersion: likelihoods.negative_binomial(2.0, dispersion),
        lambda mean: mean + mean**2 / 2,
        COUNTS,
        lambda y: scipy.stats.nbinom.logpmf(y, 2.0, 2 / (2 + y)),
    ),
}
CASES = {name: (*case, TARGETS) for name, case in UNKNOWN.items()}
CASES |= {name: case[:4] for name, case in QUASI.items()}


@pytest.fixture(params=sorted(CASES))
def unknown(request):
    return CASES[request.param]


def test_unit_dispersion_until_it_is_known(unknown):
    likelihood, known, _, targets = unknown
    unit = known(1.0)
    outputs = jnp.asarray(OUTPUTS)
    assert likelihood.sample is unit.sample
    np.testing.assert_allclose(
        likelihood.log_prob(outputs, targets), unit.log_prob(outputs, targets)
    )
    np.testing.assert_allclose(likelihood.variance(outputs), unit.variance(outputs))
    probes = jnp.ones(3)
    np.testing.assert_allclose(
        likelihood.root(outputs, probes), unit.root(outputs, probes)
    )


def numbers(likelihood, outputs, targets, probes):
    return (
        likelihood.log_prob(outputs, targets),
        likelihood.mean(outputs),
        likelihood.variance(outputs),
        likelihood.root(outputs, probes),
    )


@functools.partial(jax.jit, static_argnums=0)
def traced(likelihood, dispersion, *given):
    *given, key = given
    known = likelihood.with_dispersion(dispersion)
    return numbers(known, *given), known.sample(key, given[0])


@pytest.mark.slow
@pytest.mark.parametrize("dispersion", [0.3, 2.5])
def test_with_dispersion_is_the_known_likelihood(unknown, dispersion):
    likelihood, known, _, targets = unknown
    outputs, probes, key = jnp.asarray(OUTPUTS), jnp.ones(3), jax.random.key(0)

    def quantities(likelihood):
        return numbers(likelihood, outputs, targets, probes)

    expected = quantities(known(dispersion))
    traced_quantities, sample = traced(
        likelihood, dispersion, outputs, targets, probes, key
    )
    for values in (
        quantities(likelihood.with_dispersion(dispersion)),
        traced_quantities,
    ):
        for value, reference in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-12)
    known_sample = known(dispersion).sample(key, outputs)
    np.testing.assert_allclose(sample, known_sample, rtol=1e-12)
    assert likelihood.with_dispersion(dispersion).with_dispersion is None
    # Dispersion multiplies the variance and divides the information.
    np.testing.assert_allclose(expected[2], dispersion * likelihood.variance(outputs))
    np.testing.assert_allclose(
        expected[3] ** 2, likelihood.root(outputs, probes) ** 2 / dispersion
    )


def test_pearson_residuals(unknown):
    likelihood, known, unit_variance, targets = unknown
    outputs = jnp.asarray(OUTPUTS)
    mean = np.asarray(likelihood.mean(outputs))
    np.testing.assert_allclose(
        likelihood.pearson(outputs, targets),
        (targets - mean) ** 2 / unit_variance(mean),
        rtol=1e-12,
    )
    saturated = likelihood.pearson(jnp.array([-800.0, -600.0, 100.0]), targets)
    assert not np.any(np.isnan(saturated))


@pytest.mark.parametrize("name", UNKNOWN)
def test_unit_variance(name):
    likelihood, _, unit_variance = UNKNOWN[name]
    np.testing.assert_allclose(
        likelihood.log_unit_variance(TARGETS), np.log(unit_variance(TARGETS))
    )
    outputs, counts = jnp.asarray(OUTPUTS), jnp.array([1, 2, 3])
    value = likelihood.log_unit_variance(counts)
    assert value.dtype == jnp.float64 and value.shape == (3,)
    assert likelihood.pearson(outputs.astype(jnp.bfloat16), counts).dtype == jnp.float32


@pytest.mark.slow_cases
def test_pearson_residuals_estimate_the_dispersion(unknown):
    """Within 5 standard errors of 20000 draws."""
    likelihood, known = unknown[:2]
    outputs = jnp.broadcast_to(jnp.float64(0.8), (20_000,))
    targets = jax.jit(known(0.4).sample)(jax.random.key(5), outputs)
    squares = np.asarray(likelihood.pearson(outputs, targets))
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - 0.4) <= 5 * error


@pytest.mark.parametrize("name", QUASI)
def test_a_quasi_likelihood_is_a_double_exponential_family(name):
    unknown, known, unit_variance, targets, saturated = QUASI[name]
    outputs, once = jnp.asarray(OUTPUTS), known(1.0)
    most = saturated(targets)

    @jax.jit
    def both(dispersion):
        given = unknown.with_dispersion(dispersion)
        slope = jax.grad(lambda z: given.log_prob(z, targets).sum())(outputs)
        score = (targets - once.mean(outputs)) / given.variance(outputs)
        return slope, score * jax.vmap(jax.grad(once.mean))(outputs)

    for dispersion in (0.4, 3.0):
        value = known(dispersion).log_prob(outputs, targets)
        own = once.log_prob(outputs, targets)
        expected = (own - most) / dispersion + most - np.log(dispersion) / 2
        np.testing.assert_allclose(value, expected, rtol=1e-10)
        slope, score = both(dispersion)
        np.testing.assert_allclose(slope, score, rtol=1e-9)
    # V(y) as the normal density of that height has it: near it for a large y
    value = unknown.log_unit_variance(targets)
    np.testing.assert_allclose(value, -2 * most - np.log(2 * np.pi), rtol=1e-10)
    if name != "bernoulli":
        large = np.array([400.0])
        near = 2e-3 if name == "poisson" else 0.3  # a gamma's shape of two stays
        np.testing.assert_allclose(
            unknown.log_unit_variance(large), np.log(unit_variance(large)), atol=near
        )


@pytest.mark.slow
def test_draws_of_a_dispersion():
    """A mean and a variance, within 5 standard errors of 20000 draws."""
    outputs, key = np.full((20_000,), 0.8), jax.random.key(1)
    for unknown, known, _, _, _ in QUASI.values():

        @jax.jit
        def sample(dispersion, unknown=unknown):
            return unknown.with_dispersion(dispersion).sample(key, outputs)

        for dispersion in (0.4, 1.7):
            likelihood, draws = known(dispersion), np.asarray(sample(dispersion))
            if known is likelihoods.bernoulli and dispersion > 1:
                assert np.all(np.isnan(draws))  # no number in [0, 1] varies so much
                continue
            assert np.all(likelihood.support(draws))
            mean, variance = (
                f(outputs[0]) for f in (likelihood.mean, likelihood.variance)
            )
            assert abs(draws.mean() - mean) < 5 * np.sqrt(variance / 20_000)
            squares = (draws - mean) ** 2
            assert abs(squares.mean() - variance) < 5 * squares.std() / 20_000**0.5


def test_unit_variance_of_an_impossible_target_is_nan():
    value = likelihoods.gamma(None).log_unit_variance(jnp.array([0.0, -1.0, 1.0]))
    np.testing.assert_array_equal(np.isnan(value), [True, True, False])


def test_a_known_dispersion_has_no_such_functions(case):
    likelihood = case.likelihood
    assert likelihood.with_dispersion is None
    assert likelihood.pearson is None
    assert likelihood.log_unit_variance is None
    assert not likelihood.random_root


def test_a_dispersion_of_zero_raises(unknown):
    with pytest.raises((ValueError, ZeroDivisionError)):
        unknown[0].with_dispersion(0.0)

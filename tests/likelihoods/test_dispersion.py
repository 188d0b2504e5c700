"""Likelihoods whose dispersion is unknown: gaussian(scale=None), gamma(shape=None)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.fixture(params=sorted(UNKNOWN))
def unknown(request):
    return UNKNOWN[request.param]


def test_unit_dispersion_until_it_is_known(unknown):
    likelihood, known, _ = unknown
    unit = known(1.0)
    outputs = jnp.asarray(OUTPUTS)
    assert likelihood.sample is unit.sample
    np.testing.assert_allclose(
        likelihood.log_prob(outputs, TARGETS), unit.log_prob(outputs, TARGETS)
    )
    np.testing.assert_allclose(likelihood.variance(outputs), unit.variance(outputs))
    probes = jnp.ones(3)
    np.testing.assert_allclose(
        likelihood.root(outputs, probes), unit.root(outputs, probes)
    )


@pytest.mark.parametrize("dispersion", [0.3, 2.5])
def test_with_dispersion_is_the_known_likelihood(unknown, dispersion):
    likelihood, known, _ = unknown
    outputs, probes, key = jnp.asarray(OUTPUTS), jnp.ones(3), jax.random.key(0)

    def quantities(likelihood):
        return (
            likelihood.log_prob(outputs, TARGETS),
            likelihood.mean(outputs),
            likelihood.variance(outputs),
            likelihood.root(outputs, probes),
        )

    @jax.jit
    def traced(dispersion):
        given = likelihood.with_dispersion(dispersion)
        return quantities(given), given.sample(key, outputs)

    expected = quantities(known(dispersion))
    traced_quantities, sample = traced(dispersion)
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


def test_pearson_residuals_and_unit_variance(unknown):
    likelihood, known, unit_variance = unknown
    outputs = jnp.asarray(OUTPUTS)
    mean = np.asarray(likelihood.mean(outputs))
    np.testing.assert_allclose(
        likelihood.pearson(outputs, TARGETS),
        (TARGETS - mean) ** 2 / unit_variance(mean),
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        likelihood.log_unit_variance(TARGETS), np.log(unit_variance(TARGETS))
    )
    counts = jnp.array([1, 2, 3])
    value = likelihood.log_unit_variance(counts)
    assert value.dtype == jnp.float64 and value.shape == (3,)
    assert likelihood.pearson(outputs.astype(jnp.bfloat16), counts).dtype == jnp.float32


def test_pearson_residuals_estimate_the_dispersion(unknown):
    """Within 5 standard errors of 20000 draws."""
    likelihood, known, _ = unknown
    outputs = jnp.broadcast_to(jnp.float64(0.8), (20_000,))
    targets = jax.jit(known(0.4).sample)(jax.random.key(5), outputs)
    squares = np.asarray(likelihood.pearson(outputs, targets))
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - 0.4) <= 5 * error


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

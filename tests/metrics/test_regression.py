"""Scores of predicted distributions against integrals and enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from fisherflow_jax import metrics


@pytest.fixture(scope="module")
def gaussian():
    rng = np.random.default_rng(3)
    mean, std = rng.normal(size=8), np.exp(rng.normal(size=8))
    targets = mean + 2 * std * rng.normal(size=8)
    mask = np.arange(8) % 3 != 1
    padded = [np.where(mask, x, np.nan) for x in (mean, std, targets)]
    return mean, std, targets, mask, padded


def crps_integral(distribution, target):
    def square(x):
        return (distribution.cdf(x) - (x >= target)) ** 2

    wide = 12 * distribution.std() + abs(distribution.mean() - target)
    start, end = target - wide, target + wide
    options = {"epsabs": 1e-12, "limit": 200}
    return (
        integrate.quad(square, start, target, **options)[0]
        + integrate.quad(square, target, end, **options)[0]
    )


def test_gaussian_crps_is_the_integral(gaussian, compiled):
    mean, std, targets, mask, padded = gaussian
    expected = [
        crps_integral(stats.norm(m, s), y)
        for m, s, y in zip(mean, std, targets, strict=True)
    ]
    value = compiled(metrics.gaussian_crps, *padded, weights=mask)
    np.testing.assert_allclose(value, np.mean(np.array(expected)[mask]), rtol=1e-8)
    far = compiled(metrics.gaussian_crps, *(np.array([x]) for x in (0.0, 1e-3, 5.0)))
    # far from the mean the absolute error, less what the spread forgives
    np.testing.assert_allclose(far, 5 - 1e-3 / np.sqrt(np.pi), rtol=1e-12)


def test_gaussian_negative_log_likelihood(gaussian, compiled):
    mean, std, targets, mask, padded = gaussian
    expected = -stats.norm(mean, std).logpdf(targets)[mask].mean()
    value = compiled(metrics.gaussian_negative_log_likelihood, *padded, weights=mask)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def by_pairs(samples, target, fair):
    """The formula written out, over all pairs of samples."""
    count = len(samples)
    pairs = np.abs(samples[:, None] - samples[None, :]).sum()
    number = count * (count - 1) if fair else count**2
    return np.abs(samples - target).mean() - pairs / number / 2


@pytest.mark.parametrize("fair", [True, False])
def test_sample_crps_is_over_all_pairs(fair):
    rng = np.random.default_rng(4)
    samples, targets = rng.normal(size=(7, 3, 2)), rng.normal(size=(3, 2))
    mask = np.array([[True, False], [True, True], [False, True]])
    expected = [by_pairs(samples[(slice(None), *i)], targets[tuple(i)], fair)
                for i in np.argwhere(mask)]  # fmt: skip
    samples = np.where(mask, samples, np.nan)
    run = jax.jit(functools.partial(metrics.sample_crps, fair=fair))
    value = run(samples, targets, weights=mask)
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-12)


def test_fair_samples_score_as_their_distribution(compiled):
    rng = np.random.default_rng(5)
    draws = rng.normal(size=(3, 40_000))
    targets = np.full(40_000, 0.7)
    expected = crps_integral(stats.norm(), 0.7)
    # the standard deviation of one score is below 1
    fair = compiled(metrics.sample_crps, draws, targets)
    assert abs(fair - expected) < 5 / np.sqrt(40_000)
    # the ensemble's own score is larger by E|X - X'| / 2k = 1 / (3 sqrt(pi))
    own = jax.jit(functools.partial(metrics.sample_crps, fair=False))(draws, targets)
    assert abs(own - expected - 1 / 3 / np.sqrt(np.pi)) < 5 / np.sqrt(40_000)


def test_float32_far_from_zero(compiled):
    rng = np.random.default_rng(6)
    draws = (1000 + rng.normal(size=(50, 20)) / 8).astype(np.float32)
    targets = np.full(20, 1000.0, np.float32)
    exact = [by_pairs(draws[:, i].astype(float), 1000.0, True) for i in range(20)]
    value = compiled(metrics.sample_crps, draws, targets)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.mean(exact), rtol=1e-5)
    mean, std = draws[0], np.full(20, 0.125, np.float32)
    value = compiled(metrics.gaussian_crps, mean, std, targets)
    wide = compiled(
        metrics.gaussian_crps, *(x.astype(float) for x in (mean, std, targets))
    )
    np.testing.assert_allclose(value, wide, rtol=1e-5)


def test_half_precision_and_whole_numbers_widen(compiled):
    mean = jnp.asarray([1.0, 2.0], jnp.bfloat16)
    value = compiled(metrics.gaussian_crps, mean, mean, mean)
    assert value.dtype == jnp.float32
    counts, expected = np.array([1, 3]), [stats.norm(1), stats.norm(2, 2)]
    value = compiled(metrics.gaussian_crps, mean, mean, counts)
    expected = [crps_integral(d, y) for d, y in zip(expected, counts, strict=True)]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-6)

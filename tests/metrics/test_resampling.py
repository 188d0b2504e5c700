"""The bootstrap band against the normal theory of a mean, and what it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fisherflow_jax import metrics


def mean(values, *, weights=None):
    mask = jnp.ones(values.shape, bool) if weights is None else weights
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.sum(mask).astype(values.dtype)


@pytest.fixture(scope="module")
def examples():
    """100 numbers of which each is seen 4 times, behind as much padding."""
    numbers = np.random.default_rng(10).exponential(size=100)
    tokens = np.repeat(numbers[:, None], 4, 1)
    padding = np.full_like(tokens, np.nan)
    mask = np.ones_like(tokens, bool)
    return numbers, np.concatenate([padding, tokens]), np.concatenate([~mask, mask])


@pytest.fixture(scope="module")
def band(examples):
    """Of the mean, and of how many targets it was taken."""
    _, tokens, mask = examples

    def measure(values, *, weights):
        count = jnp.sum(weights).astype(values.dtype)
        return jnp.stack([mean(values, weights=weights), count])

    def run(values, mask):
        options = {"num_resamples": 3000, "batch_size": 3000, "level": 0.9}
        return metrics.bootstrap(measure, values, weights=mask, key=0, **options)

    return jax.jit(run)(tokens, mask)


def test_a_mean(examples, band):
    numbers = examples[0]
    # of 100 numbers, not of 400 targets: whole examples are drawn
    error = numbers.std() / 10
    assert band.value[0] == pytest.approx(numbers.mean(), rel=1e-12)
    # pivotal: the long tail of a skewed metric turns to the other side
    draws = np.random.default_rng(0).choice(numbers, (20_000, 100)).mean(-1)
    expected = 2 * numbers.mean() - np.quantile(draws, [0.95, 0.05])
    # an end's standard error is 2.1 of the mean's over sqrt(3000)
    ends = [band.lower[0], band.upper[0]]
    np.testing.assert_allclose(ends, expected, atol=4 * 2.1 * error / np.sqrt(3000))
    reach = stats.norm.ppf(0.95) * error
    np.testing.assert_allclose(ends[1] - ends[0], 2 * reach, rtol=0.1)
    assert abs(band.bias[0]) < 5 * error / np.sqrt(3000)


def test_as_many_are_drawn_as_count(band):
    for field in (band.value, band.lower, band.upper):
        assert field[1] == 400


def test_the_band_of_an_ece_takes_off_its_bias():
    rng = np.random.default_rng(12)
    p = rng.random(300)
    y = rng.random(300) < p

    def ece(p, y, *, weights=None):
        binning = metrics.equal_mass(10)
        options = {"binning": binning, "weights": weights}
        return metrics.expected_calibration_error(p, y, **options)

    run = jax.jit(lambda *a: metrics.bootstrap(ece, *a, key=3, batch_size=200))
    result = run(p, y)
    assert result.bias > 0.3 * result.value  # all of it is noise
    assert result.lower < result.value - result.bias < result.upper


def test_arguments():
    x = np.zeros(3)
    for options, text in [
        ({"level": 1.0}, r"level must be in \(0, 1\); got 1.0"),
        ({"num_resamples": 1}, "num_resamples must be .* at least 2; got 1"),
    ]:
        with pytest.raises(ValueError, match=text):
            metrics.bootstrap(mean, x, key=0, **options)
    with pytest.raises(ValueError, match=r"same leading axis .*\(3,\), \(2,\)"):
        metrics.bootstrap(metrics.brier, x, x[:2], key=0)
    with pytest.raises(ValueError, match="same leading axis"):
        metrics.bootstrap(mean, x[:0], key=0)

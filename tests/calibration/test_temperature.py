"""Temperature scaling against scipy's search, closed forms and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from fisherflow_jax import calibration, likelihoods


@pytest.fixture(scope="module")
def held_out():
    """Logits (200, 5), three times too large, and labels."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 5)) * 2
    gumbel = rng.gumbel(size=logits.shape)
    return 3 * logits, (logits + gumbel).argmax(-1)


@pytest.fixture(scope="module")
def fit():
    return jax.jit(lambda z, y, m: calibration.temperature_scaling(z, y, weights=m))


def mean_loss(logits, labels, temperature=1.0):
    log_p = special.log_softmax(logits / temperature, axis=-1)
    return -np.take_along_axis(log_p, labels[..., None], -1).mean()


def by_scipy(logits, labels):
    def loss(log_temperature):
        return mean_loss(logits, labels, np.exp(log_temperature))

    return np.exp(optimize.minimize_scalar(loss, bracket=(-1, 1), tol=1e-12).x)


def test_scipy(held_out, fit):
    logits, labels = held_out
    result = fit(logits, labels, np.ones(200, bool))
    expected = by_scipy(logits, labels)
    assert 2 < expected < 4
    np.testing.assert_allclose(result.temperature, expected, rtol=1e-6)
    np.testing.assert_allclose(result.before, mean_loss(logits, labels), rtol=1e-12)
    best = mean_loss(logits, labels, float(result.temperature))
    np.testing.assert_allclose(result.after, best, rtol=1e-12)
    slope = (mean_loss(logits, labels, result.temperature * (1 + 1e-6)) - best) / 1e-6
    assert abs(slope) < 1e-5


def test_padding_is_not_read(held_out, fit):
    logits, labels = held_out
    mask = np.arange(200) % 3 > 0
    padded = np.where(mask[:, None], logits, np.nan), np.where(mask, labels, -1)
    result = fit(*padded, mask)
    expected = by_scipy(logits[mask], labels[mask])
    np.testing.assert_allclose(result.temperature, expected, rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-4, 0.3, 1e4])
def test_the_temperature_follows_the_scale_and_not_the_offset(held_out, fit, factor):
    logits, labels = held_out
    plain = fit(logits, labels, np.ones(200, bool))
    offset = factor * np.arange(200.0)[:, None]
    moved = fit(factor * logits + offset, labels, np.ones(200, bool))
    expected = factor * plain.temperature
    np.testing.assert_allclose(moved.temperature, expected, rtol=1e-8)
    np.testing.assert_allclose(moved.after, plain.after, rtol=1e-8)


def test_float32_far_from_zero(held_out, fit):
    logits, labels = held_out
    shifted = (logits + 30_000).astype(np.float32)
    result = fit(shifted, labels.astype(np.int32), np.ones(200, bool))
    assert result.temperature.dtype == jnp.float32
    expected = by_scipy(shifted.astype(float), labels)
    np.testing.assert_allclose(result.temperature, expected, rtol=1e-5)


def test_vmap_and_further_axes(held_out, fit):
    logits, labels = (x.reshape(4, 50, *x.shape[1:]) for x in held_out)
    many = jax.vmap(calibration.temperature_scaling)(logits, labels)
    expected = [by_scipy(z, y) for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(many.temperature, expected, rtol=1e-6)


def test_bernoulli_in_closed_form():
    # k of n events at logits +-a: the best logit is log(k / (n - k))
    logits = jnp.asarray([5.0, 5.0, 5.0, 5.0, -5.0], jnp.bfloat16)
    labels = jnp.asarray([1, 1, 1, 0, 0])
    result = calibration.temperature_scaling(
        logits, labels, likelihood=likelihoods.bernoulli()
    )
    assert result.temperature.dtype == jnp.float32
    np.testing.assert_allclose(result.temperature, 5 / np.log(4), rtol=1e-4)
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    np.testing.assert_allclose(result.after, entropy, rtol=1e-5)


Z = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])


@pytest.mark.parametrize(
    "logits, labels, text",
    [
        (Z, [0, 1, 0], "every label has the largest logit"),
        (Z, [1, 0, 1], "no larger than the others"),
        (0 * Z, [1, 0, 1], "every label has the largest|no larger"),
        (Z, [0, 1, 2], "labels must be ones that categorical can produce"),
        (Z * [np.nan, 1], [0, 1, 1], "logits must be finite"),
    ],
)
def test_no_temperature(logits, labels, text, fit):
    labels = np.array(labels)
    with pytest.raises(ValueError, match=text):
        calibration.temperature_scaling(logits, labels)
    assert np.isnan(fit(logits, labels, np.ones(3, bool)).temperature)


def test_shapes():
    with pytest.raises(ValueError, match="targets have shape"):
        calibration.temperature_scaling(Z, np.array([0, 1]))
    with pytest.raises(ValueError, match="nothing to measure"):
        calibration.temperature_scaling(Z[:0], np.zeros(0, int))
    with pytest.raises(ValueError, match="weights are 0 everywhere"):
        labels, mask = np.zeros(3, int), np.zeros(3, bool)
        calibration.temperature_scaling(Z, labels, weights=mask)

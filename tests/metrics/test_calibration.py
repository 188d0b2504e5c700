"""Calibration errors against loops over the bins, and cases done by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax import metrics


def by_loop(confidence, correct, bins):
    """ECE, MCE and the curve, bin by bin."""
    gaps, shares, curve = [], [], []
    for chosen in bins:
        if not chosen.any():
            curve.append((np.nan, np.nan, 0))
            continue
        means = confidence[chosen].mean(), correct[chosen].mean()
        gaps.append(abs(means[0] - means[1]))
        shares.append(chosen.mean())
        curve.append((*means, chosen.sum()))
    return np.dot(gaps, shares), max(gaps), np.array(curve).T


def width_bins(confidence, count):
    edges = np.arange(count + 1) / count
    bins = [(confidence > a) & (confidence <= b) for a, b in itertools.pairwise(edges)]
    bins[0] |= confidence == 0
    return bins


def mass_bins(confidence, count):
    """Sorted and cut into parts of (nearly) equal size; without ties."""
    order = np.argsort(confidence)
    ranks = np.argsort(order)
    return [ranks * count // len(ranks) == k for k in range(count)]


@functools.cache
def measure(binning):
    def all_three(probabilities, labels, mask):
        options = {"binning": binning, "weights": mask}
        return (
            metrics.expected_calibration_error(probabilities, labels, **options),
            metrics.maximum_calibration_error(probabilities, labels, **options),
            jnp.stack(metrics.reliability_curve(probabilities, labels, **options)),
        )

    return jax.jit(all_three)


@pytest.mark.parametrize(
    "binning, bins",
    [(metrics.equal_width(7), width_bins), (metrics.equal_mass(7), mass_bins)],
    ids=["equal width", "equal mass"],
)
def test_loops(binning, bins, predicted, padded):
    probabilities, labels, mask = predicted
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    expected = by_loop(confidence, correct, bins(confidence, 7))
    result = measure(binning)(probabilities, labels, np.ones(60, bool))
    for got, wanted in zip(result, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10)
    kept = confidence[mask], correct[mask]
    expected = by_loop(*kept, bins(kept[0], 7))
    for got, wanted in zip(measure(binning)(*padded), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_by_hand():
    # (0, .5]: .2, .4 with events 0, 1: gap |.3 - .5|; (.5, 1]: .9 with event 1: gap .1
    p, y = np.array([0.2, 0.4, 0.9, np.nan]), np.array([0, 1, 1, 7])
    mask = np.array([True, True, True, False])
    ece, mce, curve = measure(metrics.equal_width(2))(p, y, mask)
    np.testing.assert_allclose(ece, (2 * 0.2 + 0.1) / 3, rtol=1e-12)
    np.testing.assert_allclose(mce, 0.2, rtol=1e-12)
    np.testing.assert_allclose(curve, [[0.3, 0.9], [0.5, 1], [2, 1]], rtol=1e-12)


def test_edges_belong_below():
    values = jnp.asarray(np.arange(26) / 25)
    expected = np.maximum(np.arange(26) - 1, 0)
    for dtype in (jnp.float32, jnp.float64):
        bins = metrics.equal_width(25).assign(values.astype(dtype), values >= 0)
        np.testing.assert_array_equal(bins, expected)


def test_equal_values_share_a_bin_in_any_order():
    values = np.array([0.5, 0.9, 0.5, 0.5, 0.1, 0.7, 0.5, 0.2])
    used = np.array([True] * 7 + [False])
    binning = metrics.equal_mass(3)
    bins = np.asarray(binning.assign(jnp.asarray(values), jnp.asarray(used)))
    # ranks 0, 1 (four times), 5, 6 of 7
    np.testing.assert_array_equal(bins[:7], [0, 2, 0, 0, 0, 2, 0])
    turned = binning.assign(jnp.asarray(values[::-1]), jnp.asarray(used[::-1]))
    np.testing.assert_array_equal(np.asarray(turned)[:0:-1], bins[:7])


def test_one_bin_of_equal_mass_each():
    values = jnp.asarray(np.random.default_rng(1).permutation(20) / 20)
    for count in (20, 7, 1):
        bins = metrics.equal_mass(count).assign(values, values >= 0)
        sizes = np.bincount(np.asarray(bins), minlength=count)
        assert sizes.max() - sizes.min() <= 1 and sizes.sum() == 20


def test_perfect_calibration_is_near_zero_in_float32():
    rng = np.random.default_rng(2)
    p = rng.random(300_000).astype(np.float32)
    y = rng.random(300_000) < p
    ece, _, _ = measure(metrics.equal_width(10))(p, y, np.ones(len(p), bool))
    assert ece.dtype == jnp.float32
    # E|gap| of a bin: sqrt(2 p (1 - p) / (pi n)), at most 2.3e-3
    assert ece < 3e-3
    expected, _, _ = by_loop(p.astype(float), y, width_bins(p, 10))
    np.testing.assert_allclose(ece, expected, atol=2e-6)

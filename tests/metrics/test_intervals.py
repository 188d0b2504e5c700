"""Coverage, width and score of intervals and sets, counted by hand."""

import jax
import numpy as np
import pytest
from scipy import stats

from fisherflow_jax import metrics

LOWER = np.array([0.0, 0.0, -1.0, -np.inf, np.nan])
UPPER = np.array([1.0, 2.0, 1.0, 0.0, 1.0])
TARGETS = np.array([1.0, 2.5, -1.5, -7.0, np.nan])
MASK = np.array([True, True, True, True, False])


def test_coverage(compiled):
    value = compiled(metrics.interval_coverage, LOWER, UPPER, TARGETS, weights=MASK)
    np.testing.assert_allclose(value, 2 / 4)  # ends belong to the interval


def test_width(compiled):
    finite = MASK & np.isfinite(LOWER)
    value = compiled(metrics.interval_width, LOWER, UPPER, weights=finite)
    np.testing.assert_allclose(value, 5 / 3)
    assert compiled(metrics.interval_width, LOWER, UPPER, weights=MASK) == np.inf


def test_score(compiled):
    finite = MASK & np.isfinite(LOWER)
    value = compiled(
        metrics.interval_score, LOWER, UPPER, TARGETS, level=0.8, weights=finite
    )
    np.testing.assert_allclose(value, (1 + (2 + 0.5 * 10) + (2 + 0.5 * 10)) / 3)


def test_the_true_interval_has_the_best_score(compiled):
    targets = np.random.default_rng(7).normal(size=20_000)

    def score(reach):
        ends = np.full_like(targets, reach)
        return compiled(metrics.interval_score, -ends, ends, targets, level=0.9)

    best = stats.norm.ppf(0.95)
    assert score(best) < score(0.8 * best) and score(best) < score(1.25 * best)


def test_sets(compiled):
    sets = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1]], bool)
    labels, mask = np.array([1, 0, 2, -5]), np.array([True, True, True, False])
    value = compiled(metrics.set_coverage, sets, labels, weights=mask)
    np.testing.assert_allclose(value, 2 / 3)
    np.testing.assert_allclose(compiled(metrics.set_size, sets, weights=mask), 4 / 3)


def test_vmap_and_float32():
    lower = np.zeros((3, 4), np.float32)
    targets = np.arange(12, dtype=np.float32).reshape(3, 4)
    values = jax.jit(jax.vmap(metrics.interval_coverage))(lower, lower + 5, targets)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [1, 0.5, 0])


@pytest.mark.parametrize("level", [0, 1, float("nan")])
def test_level_outside(level):
    with pytest.raises(ValueError, match=rf"level must be in \(0, 1\); got {level}"):
        metrics.interval_score(LOWER, UPPER, TARGETS, level=level)

"""What cannot be measured raises where it is at hand, and is NaN under jit."""

import jax
import numpy as np
import pytest

from fisherflow_jax import metrics

P = np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
Y = np.array([0, 1, 0])
CLASSES = [
    metrics.accuracy,
    metrics.negative_log_likelihood,
    metrics.brier,
    metrics.expected_calibration_error,
    metrics.maximum_calibration_error,
]
IMPOSSIBLE = [
    (P, np.array([0, 2, 0]), r"labels .* from 0 to 1; row 1 has 2"),
    (P, np.array([0, 1, -1]), r"labels .* from 0 to 1; row 2 has -1"),
    (P, np.array([0, 0.5, 1]), r"labels must be whole numbers .* row 1 has 0.5"),
    (P * [[1], [1.1], [1]], Y, r"sum to 1 .*; row 1 has \[0.22 0.88\]"),
    (np.array([[0.5, 0.5], [-0.2, 1.2], [1, 0]]), Y, r"at least 0 .*; row 1"),
    (np.array([[0.5, 0.5], [np.nan, 1], [1, 0]]), Y, r"sum to 1 .*row 1 has \[nan"),
    (np.array([0.5, 0.5, 1.5]), Y, r"in \[0, 1\]; row 2 has 1.5"),
]


@pytest.mark.parametrize("p, y, text", IMPOSSIBLE)
def test_impossible_predictions_and_labels(p, y, text):
    for metric in CLASSES[::2]:
        with pytest.raises(ValueError, match=text):
            metric(p, y)


def test_under_jit_they_are_nan():
    run = jax.jit(lambda p, y: [metric(p, y) for metric in CLASSES])
    assert np.all(np.isfinite(run(P, Y.astype(float))))
    for p, y, _ in IMPOSSIBLE[:-1]:
        assert np.all(np.isnan(run(p, y.astype(float))))


def test_shapes():
    for p, y in [(P, Y[:2]), (P[:, :1], Y), (P, Y[:, None]), (P[None], Y), (P[0], P)]:
        with pytest.raises(ValueError, match="do not go together") as error:
            metrics.accuracy(p, y)
        assert str(np.shape(p)) in str(error.value)
        assert str(np.shape(y)) in str(error.value)
    with pytest.raises(ValueError, match="floating point; got dtype int"):
        metrics.accuracy(P.astype(int), Y)


def test_nothing_to_count():
    with pytest.raises(ValueError, match=r"nothing to measure: .*\(0,\)"):
        metrics.accuracy(P[:0], Y[:0])
    with pytest.raises(ValueError, match="the weights are 0 everywhere"):
        metrics.brier(P, Y, weights=np.zeros(3, bool))
    with pytest.raises(ValueError, match="nothing to measure"):
        metrics.entropy(P[:0])
    value = jax.jit(lambda m: metrics.brier(P, Y, weights=m))(np.zeros(3, bool))
    assert np.isnan(value)


def test_weights_of_another_shape():
    with pytest.raises(ValueError, match=r"weights must have .* \(3,\).*; got \(2,\)"):
        metrics.accuracy(P, Y, weights=np.ones(2))


def test_numbers():
    y = np.array([1.0, 2.0])
    with pytest.raises(ValueError, match="std must be positive; row 1 has 0"):
        metrics.gaussian_crps(y, np.array([1.0, 0.0]), y)
    with pytest.raises(ValueError, match="targets must be finite; row 0 has inf"):
        metrics.gaussian_crps(y, y, np.array([np.inf, 1]))
    with pytest.raises(ValueError, match=r"std must have .* \(2,\); got \(\)"):
        metrics.gaussian_crps(y, 1.0, y)
    run = jax.jit(metrics.gaussian_crps)
    assert np.isnan(run(y, np.array([1.0, 0.0]), y))
    assert np.isnan(run(y, y, np.array([np.inf, 1])))
    with pytest.raises(ValueError, match=r"k at least 2; got shape \(1, 2\)"):
        metrics.sample_crps(y[None], y)
    with pytest.raises(ValueError, match=r"samples must be .*got shape \(2,\)"):
        metrics.sample_crps(y, y)


def test_intervals_and_sets():
    y = np.array([1.0, 2.0])
    with pytest.raises(
        ValueError, match=r"lower must not be above .*row 1 has \[3. 2."
    ):
        metrics.interval_coverage(y + [0, 1], y, y)
    with pytest.raises(ValueError, match="upper must be a number, not NaN; row 0"):
        metrics.interval_width(y, y * [np.nan, 1])
    with pytest.raises(ValueError, match=r"lower must have .* \(2,\); got \(1, 2\)"):
        metrics.interval_coverage(y[None], y, y)
    run = jax.jit(metrics.interval_coverage)
    assert np.isnan(run(y + [0, 1], y, y)) and np.isnan(run(y * [np.nan, 1], y, y))
    with pytest.raises(ValueError, match=r"sets must be boolean .* float64"):
        metrics.set_size(P)
    with pytest.raises(ValueError, match=r"labels .* from 0 to 1; row 0 has 2"):
        metrics.set_coverage(P > 0.3, Y + 2)
    with pytest.raises(ValueError, match="do not go together"):
        metrics.set_coverage(P > 0.3, Y[:2])


def test_auroc():
    scores = np.array([1.0, 2.0, np.nan])
    with pytest.raises(ValueError, match="not NaN; row 2"):
        metrics.auroc(scores, scores > 1)
    with pytest.raises(ValueError, match="got 0 positive and 2 negative"):
        metrics.auroc(scores[:2], scores[:2] > 3)
    with pytest.raises(ValueError, match=r"positive must be boolean .* int64"):
        metrics.auroc(scores, np.ones(3, int))
    run = jax.jit(metrics.auroc)
    assert np.isnan(run(scores, scores > 1))  # among the negatives
    assert np.isnan(run(scores, ~(scores <= 1)))
    assert np.isnan(run(scores[:2], scores[:2] > 3))


def test_bins():
    for factory in (metrics.equal_width, metrics.equal_mass):
        for wrong in (0, -3, 2.0):
            with pytest.raises(ValueError, match=f"num_bins .* got {wrong}"):
                factory(wrong)

"""Weights: numpy's weighted means, whole numbers as repeated rows, and what is none."""

import functools

import jax
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from fisherflow_jax import calibration, metrics

_rng = np.random.default_rng(4)
TABLE, LABELS = _rng.dirichlet(np.ones(3), (20, 3)), _rng.integers(0, 3, (20, 3))
NUMBERS, TARGETS = _rng.normal(size=(2, 20, 3))
WIDTHS, TIMES = _rng.uniform(0.5, 2, (20, 3)), _rng.integers(0, 4, (20, 3))
DRAWS = _rng.normal(size=(5, 20, 3))
LEVEL = functools.partial(metrics.interval_score, level=0.8)


def binned(metric):
    return functools.partial(metric, binning=metrics.equal_mass(4))


# name: metric, arrays, whether a stack of samples comes first
METRICS = {
    "accuracy": (metrics.accuracy, (TABLE, LABELS)),
    "nll": (metrics.negative_log_likelihood, (TABLE, LABELS)),
    "brier": (metrics.brier, (TABLE, LABELS)),
    "ece": (metrics.expected_calibration_error, (TABLE, LABELS)),
    "ece of equal mass": (binned(metrics.expected_calibration_error), (TABLE, LABELS)),
    "mce": (metrics.maximum_calibration_error, (TABLE, LABELS)),
    "auroc": (metrics.auroc, (np.round(NUMBERS, 1), LABELS == 1)),
    "gaussian nll": (
        metrics.gaussian_negative_log_likelihood,
        (NUMBERS, WIDTHS, TARGETS),
    ),
    "gaussian crps": (metrics.gaussian_crps, (NUMBERS, WIDTHS, TARGETS)),
    "sample crps": (metrics.sample_crps, (DRAWS, TARGETS)),
    "coverage": (
        metrics.interval_coverage,
        (NUMBERS - WIDTHS, NUMBERS + WIDTHS, TARGETS),
    ),
    "width": (metrics.interval_width, (NUMBERS - WIDTHS, NUMBERS + WIDTHS)),
    "interval score": (LEVEL, (NUMBERS - WIDTHS, NUMBERS + WIDTHS, TARGETS)),
    "set coverage": (metrics.set_coverage, (TABLE > 0.3, LABELS)),
    "set size": (metrics.set_size, (TABLE > 0.3,)),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", METRICS)
def test_whole_weights_repeat_and_their_unit_does_not_matter(name):
    metric, arrays = METRICS[name]

    def repeated(x):
        lead = int(x.shape[:2] != (20, 3))
        flat = x.reshape(*x.shape[:lead], 60, *x.shape[lead + 2 :])
        return np.repeat(flat, TIMES.ravel(), axis=lead)

    expected = metric(*map(repeated, arrays))
    for weights in (TIMES, 0.37 * TIMES):
        found = metric(*arrays, weights=weights)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_real_weights_against_scikit_learn():
    weights = _rng.exponential(size=(20, 3))
    table, labels = TABLE.reshape(60, 3), LABELS.ravel()
    given = {"sample_weight": weights.ravel()}
    classes = {"labels": range(3)} | given
    for metric, expected in {
        metrics.accuracy: accuracy_score(labels, table.argmax(-1), **given),
        metrics.negative_log_likelihood: log_loss(labels, table, **classes),
        metrics.brier: brier_score_loss(labels, table, scale_by_half=False, **classes),
    }.items():
        value = metric(TABLE, LABELS, weights=weights)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
    scores, positive = np.round(NUMBERS, 1), LABELS == 1
    value = metrics.auroc(scores, positive, weights=weights)
    expected = roc_auc_score(positive.ravel(), scores.ravel(), **given)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    # whole examples, and numpy alone
    each = (TARGETS >= NUMBERS - WIDTHS) & (TARGETS <= NUMBERS + WIDTHS)
    value = metrics.interval_coverage(
        NUMBERS - WIDTHS, NUMBERS + WIDTHS, TARGETS, weights=weights[:, 0]
    )
    expected = np.average(each.mean(1), weights=weights[:, 0])
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.slow
def test_a_temperature_and_a_bootstrap_take_them():
    logits = 2 * np.log(TABLE)
    found = calibration.temperature_scaling(logits, LABELS, weights=0.3 * TIMES)
    rows = (np.repeat(x.reshape(60, -1), TIMES.ravel(), 0) for x in (logits, LABELS))
    logits, labels = rows
    expected = calibration.temperature_scaling(logits, labels[:, 0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # of one target an example, weights 1 and 3: the mean is a ratio of draws
    values, weights = TARGETS[:, 0], 1.0 + 2 * (np.arange(20) % 2)
    band = metrics.bootstrap(
        lambda x, *, weights: (x * weights).sum() / weights.sum(),
        values,
        key=0,
        weights=weights,
        num_resamples=500,
    )
    np.testing.assert_allclose(band.value, np.average(values, weights=weights))
    picked = np.random.default_rng(0).integers(0, 20, (20_000, 20))
    draws = np.average(values[picked], weights=weights[picked], axis=1)
    width = np.quantile(draws, 0.95) - np.quantile(draws, 0.05)
    np.testing.assert_allclose(band.upper - band.lower, width, rtol=0.15)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_what_is_no_weight(wrong):
    weights = np.ones((20, 3))
    weights[1, 2] = wrong
    with pytest.raises(ValueError, match=f"weights must be .*; row 5 has {wrong:.0f}"):
        metrics.brier(TABLE, LABELS, weights=weights)
    run = jax.jit(lambda w: metrics.brier(TABLE, LABELS, weights=w))
    assert np.isnan(run(weights))


def test_exchangeable_examples_have_none():
    fit = calibration.conformal_intervals().fit
    options = {"level": 0.5, "mask": np.full(20, 0.5)}
    with pytest.raises(ValueError, match="conformal prediction ranks exchangeable"):
        fit(NUMBERS[:, 0], WIDTHS[:, 0], TARGETS[:, 0], **options)

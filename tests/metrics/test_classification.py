"""Accuracy, log-likelihood and Brier score against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from fisherflow_jax import metrics


def reference_accuracy(probabilities, labels):
    return accuracy_score(labels, probabilities.argmax(-1))


def reference_nll(probabilities, labels):
    return log_loss(labels, probabilities, labels=range(probabilities.shape[-1]))


def reference_brier(probabilities, labels):
    classes = range(probabilities.shape[-1])
    return brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False)


CASES = pytest.mark.parametrize(
    "metric, reference",
    [
        (metrics.accuracy, reference_accuracy),
        (metrics.negative_log_likelihood, reference_nll),
        (metrics.brier, reference_brier),
    ],
    ids=["accuracy", "nll", "brier"],
)


@CASES
def test_scikit_learn(metric, reference, predicted, padded, compiled):
    probabilities, labels, mask = predicted
    value = compiled(metric, probabilities, labels, weights=None)
    np.testing.assert_allclose(value, reference(probabilities, labels), rtol=1e-12)
    value = compiled(metric, padded[0], padded[1], weights=mask)
    expected = reference(probabilities[mask], labels[mask])
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@CASES
def test_further_axes_are_targets_of_their_own(metric, reference, predicted, compiled):
    probabilities, labels, mask = (x.reshape(20, 3, *x.shape[1:]) for x in predicted)
    value = compiled(metric, probabilities, labels, weights=mask)
    expected = reference(probabilities[mask], labels[mask])
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    whole = mask[:, 0]
    value = compiled(metric, probabilities, labels, weights=whole)
    rows = probabilities[whole].reshape(-1, 4), labels[whole].reshape(-1)
    np.testing.assert_allclose(value, reference(*rows), rtol=1e-12)


@CASES
def test_bfloat16_gives_float32(metric, reference, predicted, compiled):
    probabilities, labels, _ = predicted
    narrow = jnp.asarray(probabilities, jnp.bfloat16)
    value = compiled(metric, narrow, labels.astype(np.int32))
    assert value.dtype == jnp.float32
    rounded = np.asarray(narrow, float)
    chosen = rounded[np.arange(60), labels]
    expected = {
        metrics.accuracy: np.mean(rounded.argmax(-1) == labels),
        metrics.negative_log_likelihood: -np.mean(np.log(chosen)),
        metrics.brier: np.mean(np.sum(np.square(rounded - np.eye(4)[labels]), -1)),
    }
    np.testing.assert_allclose(value, expected[metric], rtol=2e-6)


@CASES
def test_one_probability(metric, reference, predicted, compiled):
    p = predicted[0][:, 0].astype(np.float32)
    labels = predicted[1] > 1
    value = compiled(metric, p, labels)
    both = np.stack([1 - p.astype(float), p], -1)
    expected = reference(both, labels.astype(int))
    if metric is metrics.brier:
        expected = expected / 2
        np.testing.assert_allclose(expected, brier_score_loss(labels, p), rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=2e-6)


def test_vmap(predicted):
    probabilities, labels, mask = (x.reshape(3, 20, *x.shape[1:]) for x in predicted)
    values = jax.jit(jax.vmap(lambda p, y, m: metrics.brier(p, y, weights=m)))(
        probabilities, labels, mask
    )
    for i in range(3):
        expected = reference_brier(probabilities[i][mask[i]], labels[i][mask[i]])
        np.testing.assert_allclose(values[i], expected, rtol=1e-12)


def test_gradients_are_finite_beside_padding(padded):
    probabilities, labels, mask = padded

    def loss(p):
        return metrics.negative_log_likelihood(p, labels, weights=mask)

    gradient = np.asarray(jax.jit(jax.grad(loss))(probabilities))
    assert np.all(gradient[~mask] == 0)
    chosen = np.asarray(probabilities)[mask, np.asarray(labels)[mask]]
    np.testing.assert_allclose(
        gradient[mask, np.asarray(labels)[mask]], -1 / chosen / mask.sum(), rtol=1e-12
    )


def test_a_label_of_probability_zero_is_infinitely_bad(compiled):
    p = np.array([[1.0, 0.0], [0.5, 0.5]])
    value = compiled(metrics.negative_log_likelihood, p, np.array([1, 0]))
    assert value == np.inf


def test_entropy_and_confidence(predicted, compiled):
    probabilities = np.array([*predicted[0], [1, 0, 0, 0]])
    expected = stats.entropy(probabilities, axis=-1)
    value = compiled(metrics.entropy, probabilities)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    value = compiled(metrics.confidence, probabilities)
    np.testing.assert_array_equal(value, probabilities.max(-1))

"""AUROC against scikit-learn, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fisherflow_jax import metrics


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(8)
    scores, positive = rng.normal(size=80), rng.random(80) < 0.4
    return scores, positive, rng.random(80) < 0.6


@pytest.mark.parametrize("digits", [12, 1, 0], ids=["distinct", "ties", "many ties"])
def test_scikit_learn(scored, digits, compiled):
    scores, positive, mask = scored
    scores = np.round(scores, digits)
    value = compiled(metrics.auroc, scores, positive, weights=np.ones(80, bool))
    np.testing.assert_allclose(value, roc_auc_score(positive, scores), rtol=1e-12)
    padded = np.where(mask, scores, np.nan)
    value = compiled(metrics.auroc, padded, positive, weights=mask)
    expected = roc_auc_score(positive[mask], scores[mask])
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_constant_infinite_and_zero_scores(compiled):
    positive = np.array([True, False, True, False])
    assert compiled(metrics.auroc, np.full(4, 3.0), positive) == 0.5
    scores = np.array([np.inf, np.inf, 0.0, -np.inf])  # ties of infinity
    assert compiled(metrics.auroc, scores, positive) == (0.5 + 1 + 0 + 1) / 4
    scores = np.array([0.0, -0.0, 0.0, -0.0])  # both are zero
    assert compiled(metrics.auroc, scores, positive) == 0.5


def test_float32_with_many_examples(compiled):
    rng = np.random.default_rng(9)
    scores = rng.normal(size=100_000).astype(np.float32)
    positive = rng.random(100_000) < 0.5
    scores[positive] += 1
    value = compiled(metrics.auroc, scores, positive)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, roc_auc_score(positive, scores), rtol=1e-6)


def test_half_precision_ranks_exactly(scored, compiled):
    scores = jnp.asarray(scored[0], jnp.bfloat16)
    value = compiled(metrics.auroc, scores, scored[1])
    assert value.dtype == jnp.float32
    expected = roc_auc_score(scored[1], np.asarray(scores, float))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_vmap(scored):
    scores, positive, mask = (x.reshape(2, 40) for x in scored)
    values = jax.jit(jax.vmap(lambda s, p, m: metrics.auroc(s, p, weights=m)))(
        scores, positive, mask
    )
    for i in range(2):
        expected = roc_auc_score(positive[i][mask[i]], scores[i][mask[i]])
        np.testing.assert_allclose(values[i], expected, rtol=1e-12)

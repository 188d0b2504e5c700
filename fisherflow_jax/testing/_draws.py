"""Laws of drawing: samples have the inverse for covariance."""

from typing import Any

import jax
import numpy as np
from scipy.stats import norm

from fisherflow_jax import information as ops
from fisherflow_jax.testing._laws import within_noise
from fisherflow_jax.testing._material import Material, flat

# One false alarm in a million checks of random keys; the key is fixed.
FALSE_ALARM = 1e-6


def measure(material: Material, count: int) -> jax.Array:
    """Samples `(count, d)`, each under its own key."""

    def draw(key: jax.Array) -> jax.Array:
        drawn = ops.sample(material.whole, key, material.params)
        return flat(drawn, material.params, "what sample returns")

    return jax.vmap(draw)(keys(material.key, count))


def keys(key: jax.Array, count: int) -> jax.Array:
    """The keys of the samples."""
    return jax.random.split(key, count)


def bound(count: int) -> float:
    """The z-score that the largest of `count` passes by chance once in a million."""
    return float(norm.isf(FALSE_ALARM / (2 * max(count, 1))))


def judge(found: Any, whole: np.ndarray) -> None:
    """Means of zero, and by Wishart's variances the covariance of the inverse."""
    samples = np.asarray(found, np.float64)
    count, size = samples.shape
    covariance = np.linalg.inv(whole)
    variances = np.diag(covariance)
    means = samples.mean(0) / np.sqrt(variances / count)
    within_noise(means, bound(size), f"the mean of {count} samples")
    spread = np.sqrt((covariance**2 + np.outer(variances, variances)) / count)
    errors = (samples.T @ samples / count - covariance) / spread
    upper = errors[np.triu_indices(size)]
    within_noise(upper, bound(upper.size), f"the covariance of {count} samples")


def judge_keys(samples: Any) -> None:
    """Another key, another sample."""
    assert np.any(samples[0] != samples[1]), "two keys gave the same sample"

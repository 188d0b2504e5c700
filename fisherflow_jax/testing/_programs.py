"""Laws of programs: samples, stacks and what is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax.testing._laws import within_noise
from fisherflow_jax.testing._material import Material

FACTORS = (0.5, 1.0)


def mapped(m: Material) -> Any:
    """vmap: operations over a stack are those of its parts"""
    parts = [ops.scale(m.whole, factor) for factor in FACTORS]

    def one(information: Any) -> tuple[jax.Array, jax.Array]:
        total = ops.add(information, m.whole)
        return m.flat(ops.solve(total, m.vector)), ops.trace(total, m.params)

    solved, traces = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    totals = [(1 + factor) * m.dense.whole for factor in FACTORS]
    expected = [np.linalg.solve(total, m.dense.vector) for total in totals]
    return [
        (solved, np.stack(expected)),
        (traces, np.stack(list(map(np.trace, totals)))),
    ]


def sample(m: Material) -> Any:
    """sample: samples have mean zero and the inverse matrix for covariance"""

    def judge(samples: np.ndarray) -> None:
        samples = samples.astype(np.float64)
        count, size = samples.shape
        covariance, variances = m.dense.inverse, np.diag(m.dense.inverse)
        means = samples.mean(0) / np.sqrt(variances / count)
        within_noise(means, f"the mean of {count} samples")
        # by Wishart's variances
        spread = np.sqrt((covariance**2 + np.outer(variances, variances)) / count)
        errors = (samples.T @ samples / count - covariance) / spread
        upper = np.triu_indices(size)
        within_noise(errors[upper], f"the covariance of {count} samples")

    return m.samples, judge


def keys(m: Material) -> Any:
    """keys: the same key gives the same sample, another key another"""

    def judge(samples: np.ndarray) -> None:
        assert np.any(samples[0] != samples[1]), "two keys gave the same sample"

    return m.samples[:2], judge

"""Laws of programs: samples, stacks and what is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax.testing._laws import QUICKLY, equal, within_noise
from fisherflow_jax.testing._material import Material, PyTree

FACTORS = (0.5, 1.0)


def mapped(m: Material) -> Any:
    """vmap: operations over a stack are those of its parts"""
    parts = [ops.scale(m.whole, factor) for factor in FACTORS]

    def one(information: Any) -> tuple[jax.Array, jax.Array]:
        total = ops.add(information, m.whole)
        return m.flat(ops.solve(total, m.vector)), ops.trace(total, m.params)

    found = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    for solved, trace, factor in zip(*found, FACTORS, strict=True):
        total = (1 + factor) * m.dense.whole
        expected = np.linalg.solve(total, m.dense.vector)
        equal(solved, expected, m.tolerance, "solve of a part of a stack")
        equal(trace, np.trace(total), m.tolerance, "trace of a part of a stack")


def compiled(m: Material) -> Any:
    """jit: eager calls give the numbers of compiled ones"""

    def run(information: Any, vector: PyTree, key: jax.Array) -> list[jax.Array]:
        return [
            m.flat(ops.solve(information, vector)),
            m.flat(ops.matvec(information, vector)),
            ops.logdet(information, m.params),
            m.flat(ops.sample(information, key, m.params)),
        ]

    arguments = m.whole, m.vector, m.key
    jitted = jax.jit(run, compiler_options=QUICKLY)(*arguments)
    return list(zip(jitted, run(*arguments), strict=True))


def sample(m: Material) -> Any:
    """sample: samples have mean zero and the inverse matrix for covariance"""
    samples = m.samples.astype(np.float64)
    count, size = samples.shape
    covariance, variances = m.dense.inverse, np.diag(m.dense.inverse)
    means = samples.mean(0) / np.sqrt(variances / count)
    within_noise(means, f"the mean of {count} samples")
    # by Wishart's variances
    spread = np.sqrt((covariance**2 + np.outer(variances, variances)) / count)
    errors = (samples.T @ samples / count - covariance) / spread
    within_noise(errors[np.triu_indices(size)], f"the covariance of {count} samples")


def keys(m: Material) -> Any:
    """keys: the same key gives the same sample, another key another"""
    assert np.any(m.samples[0] != m.samples[1]), "two keys gave the same sample"

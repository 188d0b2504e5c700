"""Kronecker factors damped one by one: two small inverses in place of eigenvectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax.layers import Layers
from fisherflow_jax.structures._algebra import dense, layer_vectors
from fisherflow_jax.structures._algebra.eigen import parts_by_layer
from fisherflow_jax.structures._kronecker import Kronecker, multiplied

PyTree = Any


class LayerInverses(NamedTuple):
    """The damped inverse of each factor, and what other parameters are divided by."""

    input_inverses: dict[str, jax.Array]  # (K, I, I), or (K, I) for a diagonal
    output_inverses: dict[str, jax.Array]  # (K, O, O), or (K, O) for a diagonal
    plain_divisors: dict[str, jax.Array]
    inverted_layers: Layers  # static

    def divide(self, vector: PyTree) -> PyTree:
        """The inverses on both sides of each layer's matrix."""
        left, layers = self.input_inverses, self.inverted_layers
        dtype = next(x.dtype for x in jax.tree.leaves((left, self.plain_divisors)))
        leaves, others = layer_vectors.split(layers, vector, dtype)
        for name, matrix in leaves.items():
            right = self.output_inverses[name]
            leaves[name] = multiplied(left[name], matrix, right)
        leaves |= {name: x / self.plain_divisors[name] for name, x in others.items()}
        return layer_vectors.join(layers, leaves, vector)


@ops.factored.register
def _(information: Kronecker, damping: jax.Array) -> LayerInverses:
    inputs, outputs = {}, {}
    for name, factor in information.input_factors.items():
        # a mean over observations holds n of them: A / n, and G as it is
        left = factor / information.num_observations
        right = information.output_factors[name]
        root = jnp.sqrt(damping + information.shifts[name])
        balance = jnp.sqrt(_mean_eigenvalue(left) / _mean_eigenvalue(right))
        inputs[name] = _inverse(left, balance * root)
        outputs[name] = _inverse(right, root / balance)
    entries = information.other_entries
    divisors = {name: x + damping for name, x in entries.items()}
    return LayerInverses(
        input_inverses=inputs,
        output_inverses=outputs,
        plain_divisors=divisors,
        inverted_layers=information.layers,
    )


def _mean_eigenvalue(factor: jax.Array) -> jax.Array:
    """`(K,)`, kept from zero, which a layer without any gradient has."""
    diagonal = factor
    if factor.ndim == 3:
        diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
    mean = jnp.mean(diagonal, axis=1)
    return jnp.where(mean > 0, mean, jnp.ones_like(mean))


def _inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    if factor.ndim == 2:
        return 1 / (factor + damping[:, None])
    identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return dense.inverse_matrix(factor + damping[:, None, None] * identity[None])


@ops.parts.register
def _(factors: LayerInverses) -> list[tuple[str, int]]:
    return parts_by_layer(factors)

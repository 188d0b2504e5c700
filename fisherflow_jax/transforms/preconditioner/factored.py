"""Factored damping of Kronecker factors: two small inverses instead of eigenvectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from fisherflow_jax.layers import Layers
from fisherflow_jax.structures import Kronecker
from fisherflow_jax.structures._algebra import dense, layer_vectors
from fisherflow_jax.transforms.preconditioner import factorise as preconditioning

PyTree = Any


class LayerInverses(NamedTuple):
    """The damped inverse of each factor, and what other parameters are divided by."""

    input_inverses: dict[str, jax.Array]  # (K, I, I), or (K, I) for a diagonal
    output_inverses: dict[str, jax.Array]  # (K, O, O), or (K, O) for a diagonal
    plain_divisors: dict[str, jax.Array]
    inverted_layers: Layers  # static


def factored_damping(
    information: Kronecker,
    damping: jax.Array,
    power: float = -1,
    root_damping: float = 0.0,
) -> LayerInverses:
    r"""Damps each Kronecker factor instead of the product.

    .. math::
      (A + \pi \sqrt\lambda)^{-1} \otimes (G + \sqrt\lambda / \pi)^{-1}, \qquad
      \pi^2 = \frac{\operatorname{tr} A / I}{\operatorname{tr} G / O}

    For `factorise=` of `ff.scale_by_fisher`: two Cholesky factorisations a layer, three
    to six times cheaper than the eigendecompositions of damping that is exact
    (`factorise`, the default). The product is damped by `lambda` and by cross terms on
    top, so that steps are shorter.

    Args:
      information: the mean information of an observation, a `Kronecker`.
      damping: `lambda`, on the information's scale.
      power: -1.
      root_damping: 0.

    Returns:
      A `LayerInverses`, for `ff.transforms.apply`.

    Raises:
      ValueError: for another structure, power or root_damping.

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015.
    """
    if not isinstance(information, Kronecker) or power != -1 or root_damping != 0:
        raise ValueError(
            "factored damping is for the inverse of a Kronecker information: got "
            f"{type(information).__name__}, power {power}, root_damping {root_damping}."
        )
    inputs, outputs = {}, {}
    for name, factor in information.input_factors.items():
        # a mean over observations holds n of them: A / n, and G as it is
        left = factor / information.num_observations
        right = information.output_factors[name]
        shift = damping + information.shifts[name]
        balance = jnp.sqrt(_mean_eigenvalue(left) / _mean_eigenvalue(right))
        root = jnp.sqrt(shift)
        inputs[name] = _inverse(left, balance * root)
        outputs[name] = _inverse(right, root / balance)
    divisors = {
        name: entries + damping for name, entries in information.other_entries.items()
    }
    return LayerInverses(inputs, outputs, divisors, information.layers)


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


@preconditioning.apply.register
def _(factorisation: LayerInverses, vector: PyTree) -> PyTree:
    layers, left = factorisation.inverted_layers, factorisation.input_inverses
    dtype = next(x.dtype for x in jax.tree.leaves((left, factorisation.plain_divisors)))
    matrices, others = layer_vectors.split(layers, vector, dtype)
    solved = {}
    for name, matrix in matrices.items():
        matrix = _times(left[name], matrix)
        turned = jnp.swapaxes(matrix, 1, 2)
        turned = _times(factorisation.output_inverses[name], turned)
        solved[name] = jnp.swapaxes(turned, 1, 2)
    rest = {name: x / factorisation.plain_divisors[name] for name, x in others.items()}
    return layer_vectors.join(layers, solved | rest, vector)


def _times(inverse: jax.Array, matrix: jax.Array) -> jax.Array:
    if inverse.ndim == 2:
        return inverse[:, :, None] * matrix
    return jnp.einsum("kij,kjo->kio", inverse, matrix, precision=Precision.HIGHEST)

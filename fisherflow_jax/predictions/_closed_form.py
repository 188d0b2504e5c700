r"""Posteriors of a last linear layer alone: no backward pass.

The layer's outputs are the model's, so that with its inputs :math:`\phi` and an
eigenbasis U of the outputs' side,

.. math:: \mathrm{Cov}(z) = U \operatorname{diag}(c) U^\top, \qquad
   c_o = \sum_i \phi_i^2 V_{io}.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.arrays import widen
from fisherflow_jax.predictions._pulling import (
    Spreads,
    rotated_inputs,
    weights_of_outputs,
)
from fisherflow_jax.predictions._whitening import Rows

PyTree = Any


class LastLayer(NamedTuple):
    """The outputs of one example, and their covariance `U diag(weights) U^T`."""

    outputs: jax.Array  # (..., k)
    weights: jax.Array  # (..., k)
    basis: jax.Array | None  # U (k, k), the same for all; None: the identity

    def rows(self, cotangents: jax.Array) -> Rows:
        """Cotangents `(R, 1, ..., k)` in the eigenbasis."""
        turned = cotangents.astype(self.weights.dtype)[:, 0]
        if self.basis is not None:
            turned = jnp.matmul(turned, self.basis, precision=Precision.HIGHEST)
        right = turned.reshape((turned.shape[0], -1))
        return Rows(right * self.weights.reshape((1, -1)), right)

    def variance(self) -> jax.Array:
        """Of each output, `(..., k)`."""
        if self.basis is None:
            return self.weights
        squares = jnp.square(self.basis).T
        return jnp.matmul(self.weights, squares, precision=Precision.HIGHEST)

    def covariance(self) -> jax.Array:
        """Of the outputs on the last axis, `(..., k, k)`."""
        weights = self.weights.reshape((*self.weights.shape[:-1], -1))
        if self.basis is None:
            return jnp.vectorize(jnp.diag, signature="(k)->(k,k)")(weights)
        return jnp.einsum(
            "ij,...j,kj->...ik",
            self.basis,
            weights,
            self.basis,
            precision=Precision.HIGHEST,
        )

    def log_odds_variance(self) -> jax.Array:
        r"""Of each class against the others, `(..., k)`, in O(k^2) a position.

        The gradient of :math:`\eta_r` is :math:`(e_r - p) / (1 - p_r)`; for the most
        probable class, where that cancels, :math:`e_r - q` with q the probabilities of
        the others among themselves.
        """
        k = self.outputs.shape[-1]
        if k == 1:  # certain
            return jnp.zeros_like(self.weights)
        flat = self.outputs.reshape((-1, k)), self.weights.reshape((-1, k))
        variances = jax.lax.map(
            lambda pair: _log_odds_variance(pair[0], pair[1], self.basis), flat
        )
        return variances.reshape(self.weights.shape)


def _log_odds_variance(
    outputs: jax.Array, weights: jax.Array, basis: jax.Array | None
) -> jax.Array:
    logits = widen(outputs).astype(weights.dtype)
    probabilities = jax.nn.softmax(logits)
    largest = jax.nn.one_hot(jnp.argmax(logits), logits.shape[0], dtype=bool)
    others = jax.nn.softmax(jnp.where(largest, -jnp.inf, logits))
    if basis is None:
        squares = weights * jnp.square(probabilities)
        rest = jnp.sum(squares) - squares
        of_rest = weights * jnp.square(1 - probabilities) + rest
        of_largest = weights + jnp.sum(weights * jnp.square(others))
    else:
        # sums of squares of differences: what all logits share cancels exactly
        mean = jnp.matmul(probabilities, basis, precision=Precision.HIGHEST)
        of_rest = jnp.sum(weights[None] * jnp.square(basis - mean[None]), -1)
        mean = jnp.matmul(others, basis, precision=Precision.HIGHEST)
        row = basis[jnp.argmax(logits)]
        of_largest = jnp.sum(weights * jnp.square(row - mean))[None]
    remaining = jnp.where(largest, jnp.ones_like(logits), 1 - probabilities)
    return jnp.where(largest, of_largest, of_rest / jnp.square(remaining))


def closed_form(
    apply_fn: Callable, params: PyTree, spreads: Spreads
) -> Callable[[PyTree], LastLayer]:
    """For one example, leading axis 1. Cost: a forward pass and `I k` products."""
    (layer,), (spread,) = spreads.layers.layers, spreads.by_layer
    dtype = trees.float_dtype(params)
    columns = spread.outputs.columns

    def at(example: PyTree) -> LastLayer:
        outputs, (inputs,), _ = layers_of.tap(apply_fn, spreads.layers, params, example)
        entered = rotated_inputs(layer, spread, inputs, dtype)
        weights = weights_of_outputs(entered, spread.variances)
        return LastLayer(
            outputs[0],
            weights.reshape(outputs.shape[1:]),
            None if columns is None else columns[0],
        )

    return at

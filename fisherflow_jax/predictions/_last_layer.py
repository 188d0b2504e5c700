r"""A last linear layer alone: found in the model's program; no backward pass.

The layer's outputs are the model's, so that with its inputs :math:`\phi` and an
eigenbasis U of the outputs' side,

.. math:: \mathrm{Cov}(z) = U \operatorname{diag}(c) U^\top, \qquad
   c_o = \sum_i \phi_i^2 V_{io}.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import arrays, checks, linalg, trees
from fisherflow_jax._ground import batch as batches
from fisherflow_jax.layers import Layers
from fisherflow_jax.products import LayerCovariances, Pulled

PyTree = Any


class LastLayer(NamedTuple):
    """The outputs of one example, and their covariance `U diag(weights) U^T`."""

    outputs: jax.Array  # (..., k)
    weights: jax.Array  # (..., k)
    basis: jax.Array | None  # U (k, k), the same for all; None: the identity

    def pull(self, cotangents: jax.Array) -> Pulled:
        """Cotangents `(R, 1, ..., k)` in the eigenbasis."""
        turned = cotangents.astype(self.weights.dtype)[:, 0]
        if self.basis is not None:
            turned = linalg.product("...i,ij->...j", turned, self.basis)
        right = turned.reshape((turned.shape[0], -1))
        return Pulled(right * self.weights.reshape((1, -1)), right)

    def variance(self) -> jax.Array:
        """Of each output, `(..., k)`."""
        if self.basis is None:
            return self.weights
        return linalg.product("...j,ij->...i", self.weights, jnp.square(self.basis))

    def covariance(self) -> jax.Array:
        """Of the outputs on the last axis, `(..., k, k)`."""
        weights = self.weights.reshape((*self.weights.shape[:-1], -1))
        if self.basis is None:
            return jnp.vectorize(jnp.diag, signature="(k)->(k,k)")(weights)
        return linalg.product("ij,...j,kj->...ik", self.basis, weights, self.basis)

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
    logits = arrays.widen(outputs).astype(weights.dtype)
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
        mean = linalg.product("i,ij->j", probabilities, basis)
        of_rest = jnp.sum(weights[None] * jnp.square(basis - mean[None]), -1)
        mean = linalg.product("i,ij->j", others, basis)
        row = basis[jnp.argmax(logits)]
        of_largest = jnp.sum(weights * jnp.square(row - mean))[None]
    remaining = jnp.where(largest, jnp.ones_like(logits), 1 - probabilities)
    return jnp.where(largest, of_largest, of_rest / jnp.square(remaining))


def closed_form(
    apply_fn: Callable, params: PyTree, found: LayerCovariances
) -> Callable[[PyTree], LastLayer]:
    """For one example, leading axis 1. Cost: a forward pass and `I k` products."""
    (layer,), dtype = found.each, trees.float_dtype(params)
    basis = None if layer.sides[1] is None else layer.sides[1][0]

    def at(example: PyTree) -> LastLayer:
        outputs, (inputs,), _ = layers_of.tap(apply_fn, found.layers, params, example)
        weights = layer.weights(layer.entered(inputs, dtype))
        return LastLayer(outputs[0], weights.reshape(outputs.shape[1:]), basis)

    return at


def is_last_layer(
    apply_fn: Callable, params: PyTree, inputs: PyTree, layers: Layers
) -> bool:
    """Whether the outputs are those of the only layer, plus what does not depend on it.

    What returns to the layer is then the cotangent itself, whatever the values.
    """
    if len(layers.layers) != 1 or layers.fallback:
        return False
    layer, same = layers.layers[0], []
    if layer.num_stacked != 1 or layer.kind == "embedding":
        return False

    def compare(params: PyTree, example: PyTree) -> None:
        outputs, _, back = layers_of.tap(apply_fn, layers, params, example)
        cotangent = np.random.default_rng(0).integers(-99, 99, outputs.shape)
        # computed here where it depends on no parameter and no input
        with jax.ensure_compile_time_eval():
            (returned,), _ = back(jnp.asarray(cotangent, outputs.dtype))
        wide = layer.num_outputs == (outputs.shape[-1] if outputs.ndim > 1 else 1)
        same.append(
            wide
            and checks.is_concrete(returned)
            and np.array_equal(np.asarray(returned).ravel(), cotangent.ravel())
        )

    parts, rebuild = batches.split(inputs)
    jax.eval_shape(compare, params, batches.unshare(rebuild([x[:1] for x in parts])))
    return same == [True]

r"""The covariance of many outputs as a sum over layers, example by example.

Where a kernel is used once an example, that of outputs r, s of examples n, m is

.. math:: \sum_o g_{nro} \, g_{mso} \sum_i a_{ni} a_{mi} V_{io},

so that nothing of the size of outputs times parameters is formed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision

from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import trees
from fisherflow_jax.layers import Layer
from fisherflow_jax.predictions._pulling import (
    Spread,
    Spreads,
    embedding_rows,
    layer_rows,
    rotated_inputs,
    turned,
)
from fisherflow_jax.predictions._streaming import in_chunks
from fisherflow_jax.predictions._whitening import Rows

PyTree = Any


def covariance_of_layers(
    mean: PyTree,
    apply_fn: Callable,
    spreads: Spreads,
    parts: list[jax.Array],
    example_of: Callable[[list], PyTree],
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The outputs `(n, ..., k)` and the covariance `(m, m)` of all of them."""
    layers, dtype = spreads.layers, trees.float_dtype(mean)

    def one(parts: list) -> tuple:
        outputs, entering, pull = layers_of.tap(
            apply_fn, layers, mean, example_of(parts)
        )
        units = jnp.eye(outputs.size, dtype=outputs.dtype)
        gradients, others = jax.vmap(pull)(
            units.reshape((outputs.size, *outputs.shape))
        )
        return outputs[0], entering, gradients, others

    outputs, entering, gradients, others = in_chunks(one, parts, chunk_size)
    covariance = jnp.zeros((outputs.size, outputs.size), dtype)
    for layer, spread, inputs, returned in zip(
        layers.layers, spreads.by_layer, entering, gradients, strict=True
    ):
        covariance += _of_layer(layer, spread, inputs, returned.astype(dtype))
    for leaf, values in others.items():
        flat = values.astype(dtype).reshape((outputs.size, -1))
        variances = spreads.others[leaf].reshape((1, -1))
        covariance += Rows(flat * variances, flat).covariance()
    return outputs, covariance


def _of_layer(
    layer: Layer, spread: Spread, inputs: jax.Array, gradients: jax.Array
) -> jax.Array:
    """From inputs `(n, K, T, I)` and gradients `(n, R, K, T, O)`: `(n R, n R)`."""
    count = gradients.shape[0] * gradients.shape[1]
    if layer.kind != "embedding" and layer.num_positions > 1:
        rows = jax.vmap(lambda a, g: layer_rows(layer, spread, a, g))(inputs, gradients)
        return Rows(*(x.reshape((count, -1)) for x in rows)).covariance()
    returned = turned("nrkto,kop->nrktp", gradients, spread.outputs)
    if layer.kind == "embedding":
        with_all = _of_table(layer, spread, inputs, returned)
    else:
        inputs = jax.vmap(lambda a: rotated_inputs(layer, spread, a, gradients.dtype))(
            inputs
        )
        with_all = _of_kernel(spread, inputs, returned)
    return jax.lax.map(with_all, (inputs, returned)).reshape((count, count))


# The covariances of one example's outputs with all, `(R, n, R)`.
_WithAll = Callable[[tuple[jax.Array, jax.Array]], jax.Array]


def _of_kernel(spread: Spread, inputs: jax.Array, returned: jax.Array) -> _WithAll:
    """A kernel that each example uses once."""

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        entering, rows = one
        products = jnp.swapaxes(entering[None] * inputs, 0, 2)[0]  # (K, n, I)
        weights = jnp.einsum(
            "kni,kio->nko", products, spread.variances, precision=Precision.HIGHEST
        )
        weighted = weights[:, None, :, None] * returned
        return jnp.einsum(
            "rkto,nskto->rns", rows, weighted, precision=Precision.HIGHEST
        )

    return with_all


def _of_table(
    layer: Layer, spread: Spread, ids: jax.Array, returned: jax.Array
) -> _WithAll:
    """The rows of a table that two examples both look up."""

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        own, rows = one
        left = embedding_rows(layer, spread.variances, own, rows).left
        same = own[None, :, :, None] == ids[:, :, None, :]
        met = jnp.einsum(
            "nktu,nskuo->nskto",
            same.astype(left.dtype),
            returned,
            precision=Precision.HIGHEST,
        )
        if layer.bias is not None:
            of_bias = jnp.sum(returned, axis=3, keepdims=True)
            met = jnp.concatenate([met, of_bias], axis=3)
        return jnp.einsum("rkto,nskto->rns", left, met, precision=Precision.HIGHEST)

    return with_all

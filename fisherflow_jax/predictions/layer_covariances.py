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
from fisherflow_jax import vectors
from fisherflow_jax.layers import Layer
from fisherflow_jax.predictions.pulling import (
    Spread,
    Spreads,
    layer_rows,
    rotated_inputs,
    turned,
)
from fisherflow_jax.predictions.streaming import in_chunks
from fisherflow_jax.predictions.whitening import Rows

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
    layers, dtype = spreads.layers, vectors.float_dtype(mean)

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
    if layer.kind == "embedding" or layer.num_positions > 1:
        rows = jax.vmap(lambda a, g: layer_rows(layer, spread, a, g))(inputs, gradients)
        return Rows(*(x.reshape((count, -1)) for x in rows)).covariance()
    returned = turned("nrkto,kop->nrktp", gradients, spread.outputs)[..., 0, :]
    entered = jax.vmap(lambda a: rotated_inputs(layer, spread, a, gradients.dtype))(
        inputs
    )

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The covariances of one example's outputs with all, `(R, n, R)`."""
        entering, rows = one
        products = jnp.swapaxes(entering[None] * entered, 0, 2)[0]  # (K, n, I)
        weights = jnp.einsum(
            "kni,kio->nko", products, spread.variances, precision=Precision.HIGHEST
        )
        weighted = weights[:, None] * returned
        return jnp.einsum("rko,nsko->rns", rows, weighted, precision=Precision.HIGHEST)

    blocks = jax.lax.map(with_all, (entered, returned))
    return blocks.reshape((count, count))

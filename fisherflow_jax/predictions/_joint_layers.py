r"""The covariance of many outputs as a sum over layers, example by example.

Where a kernel is used once an example, that of outputs r, s of examples n, m is

.. math:: \sum_o g_{nro} \, g_{mso} \sum_i a_{ni} a_{mi} V_{io},

so that nothing of the size of outputs times parameters is formed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import layers as layers_of
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.chunks import map_chunks
from fisherflow_jax._ground.linalg import product
from fisherflow_jax.predictions._covariance import (
    LayerCovariance,
    LayerCovariances,
    Pulled,
)

PyTree = Any


def covariance_of_layers(
    mean: PyTree,
    apply_fn: Callable,
    found: LayerCovariances,
    parts: list[jax.Array],
    example_of: Callable[[list], PyTree],
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The outputs `(n, ..., k)` and the covariance `(m, m)` of all of them."""
    dtype = trees.float_dtype(mean)

    def one(parts: list) -> tuple:
        example = example_of(parts)
        outputs, entering, back = layers_of.tap(apply_fn, found.layers, mean, example)
        units = jnp.eye(outputs.size, dtype=outputs.dtype)
        gradients = jax.vmap(back)(units.reshape((outputs.size, *outputs.shape)))
        return outputs[0], entering, *gradients

    pulled = map_chunks(jax.vmap(one), parts, chunk_size)
    outputs, entering, gradients, others = pulled
    covariance = jnp.zeros((outputs.size, outputs.size), dtype)
    for part, inputs, back in zip(found.each, entering, gradients, strict=True):
        covariance += _of_layer(part, inputs, back.astype(dtype))
    for leaf, values in others.items():
        flat = values.astype(dtype).reshape((outputs.size, -1))
        covariance += found.of_leaf(leaf, flat).covariance()
    return outputs, covariance


def _of_layer(
    part: LayerCovariance, inputs: jax.Array, gradients: jax.Array
) -> jax.Array:
    """From inputs `(n, K, T, I)` and gradients `(n, R, K, T, O)`: `(n R, n R)`."""
    layer, count = part.layer, gradients.shape[0] * gradients.shape[1]
    if layer.kind != "embedding" and layer.num_positions > 1:
        rows = jax.vmap(part.pulled)(inputs, gradients)
        return Pulled(*(x.reshape((count, -1)) for x in rows)).covariance()
    returned = part.returned(gradients)
    if layer.kind == "embedding":
        with_all = _of_table(part, inputs, returned)
    else:
        inputs = jax.vmap(lambda a: part.entered(a, gradients.dtype))(inputs)
        with_all = _of_kernel(part, inputs, returned)
    return jax.lax.map(with_all, (inputs, returned)).reshape((count, count))


# The covariances of one example's outputs with all, `(R, n, R)`.
_WithAll = Callable[[tuple[jax.Array, jax.Array]], jax.Array]


def _of_kernel(
    part: LayerCovariance, inputs: jax.Array, returned: jax.Array
) -> _WithAll:
    """A kernel that each example uses once."""

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        entering, rows = one
        products = jnp.swapaxes(entering[None] * inputs, 0, 2)[0]  # (K, n, I)
        weights = product("kni,kio->nko", products, part.variances)
        return product("rkto,nskto->rns", rows, weights[:, None, :, None] * returned)

    return with_all


def _of_table(part: LayerCovariance, ids: jax.Array, returned: jax.Array) -> _WithAll:
    """The rows of a table that two examples both look up."""

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        own, rows = one
        left = part.looked_up(own, rows).left
        same = (own[None, :, :, None] == ids[:, :, None, :]).astype(left.dtype)
        met = product("nktu,nskuo->nskto", same, returned)
        if part.layer.bias is not None:
            of_bias = jnp.sum(returned, axis=3, keepdims=True)
            met = jnp.concatenate([met, of_bias], axis=3)
        return product("rkto,nskto->rns", left, met)

    return with_all

"""Products with the exact Fisher information, which is never formed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


def fisher_product(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batch: Batch,
    vector: PyTree,
    key: jax.Array | None = None,
) -> PyTree:
    r"""`sum_i w_i J_i^T L_i L_i^T J_i v`, by one forward and one backward derivative.

    Memory: a pass of the whole batch. A likelihood with a sampled root draws it with
    the key, the same for every vector.
    """
    inputs = batches.unshare(batch.inputs)

    def model(p: PyTree) -> jax.Array:
        return apply_fn(p, inputs)

    tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
    outputs, moved = jax.jvp(model, (params,), (tangent,))
    shape = likelihood.probe_shape(outputs.shape)
    probes = jax.ShapeDtypeStruct(shape, trees.wide_dtype(outputs.dtype))

    def root(x: jax.Array) -> jax.Array:
        return likelihood.root(outputs, x, key)

    (transposed,) = jax.linear_transpose(root, probes)(moved)
    cotangents = root(transposed)
    weights = batch.weights.astype(trees.wide_dtype(cotangents.dtype))
    weights = weights.reshape((-1,) + (1,) * (cotangents.ndim - 1))
    weighted = jnp.where(weights > 0, weights * cotangents.astype(weights.dtype), 0)
    _, vjp = jax.vjp(model, params)
    product = trees.widen(vjp(weighted.astype(outputs.dtype))[0])
    return batches.zero_if_missing(batch, product)

"""The two factors of a layer's information, from its inputs and output gradients.

The vector of example n is `sum_t a_nt g_nt^T`. Kronecker factors treat what enters a
layer and what returns to it as independent, and need a convention for the T positions
that share the kernel.
"""

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.linalg import product
from fisherflow_jax.structures._algebra.outer_products import OuterProducts
from fisherflow_jax.structures.sharing import Sharing


def _gram(rows: jax.Array, widest: int) -> jax.Array:
    """`(..., K, S, D)` -> `(K, D, D)`, or its diagonal `(K, D)` for a wide side."""
    if rows.shape[-1] > widest:
        axes = (*range(rows.ndim - 3), rows.ndim - 2)
        return jnp.sum(jnp.square(rows), axis=axes)
    return product("...ksi,...ksj->kij", rows, rows)


def with_bias(inputs: jax.Array) -> jax.Array:
    """A one beside the inputs: the bias is a kernel's row that sees only ones."""
    return jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)


def factors(
    products: OuterProducts, sharing: Sharing, widest: int
) -> tuple[jax.Array, jax.Array]:
    """A `(K, I, I)` and G `(K, O, O)`, sums over examples; diagonals where wide."""
    dtype = products.gradients.dtype
    if products.one_hot:
        inputs, gradients = _one_hot(products, sharing)
        return inputs, _gram(gradients, widest)
    inputs = products.inputs.astype(dtype)
    if products.has_bias:
        inputs = with_bias(inputs)
    inputs, gradients = sharing(inputs, products.gradients)
    roots = jnp.sqrt(products.weights).astype(dtype)
    weighted = inputs * roots[:, None, None, None]
    return _gram(weighted, widest), _gram(gradients, widest)


def _one_hot(products: OuterProducts, sharing: Sharing) -> tuple[jax.Array, jax.Array]:
    """The diagonal of A `(K, I)`, and the gradients as shared."""
    ids, dtype = products.inputs, products.gradients.dtype
    ones, gradients = sharing(jnp.ones((*ids.shape, 1), dtype), products.gradients)
    weights = products.weights.astype(dtype)[:, None, None]
    if ones.shape[2] == ids.shape[2]:
        shares = jnp.square(ones[..., 0])
    elif ones.shape[2] != 1:
        raise ValueError(
            "an embedding's positions are kept or pooled into one by sharing; got "
            f"{ones.shape[2]} of {ids.shape[2]} positions."
        )
    else:
        # the pooled input of an id is the share of the positions that hold it
        same = ids[:, :, :, None] == ids[:, :, None, :]
        shares = jnp.sum(same.astype(dtype), -1) / ids.shape[2] ** 2
    stacked = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :, None]
    zeros = jnp.zeros((ids.shape[1], products.num_inputs), dtype)
    places = jnp.broadcast_to(stacked, ids.shape), ids
    inputs = zeros.at[places].add(shares * weights, mode="drop")
    if products.has_bias:
        of_bias = jnp.sum(jnp.square(ones[..., 0]) * weights, axis=(0, 2))
        inputs = jnp.concatenate([inputs, of_bias[:, None]], axis=1)
    return inputs, gradients

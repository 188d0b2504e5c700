"""The whole matrix of vectors that are outer products, without forming the vectors.

With R vectors an example the products of two layers' vectors are

    sum_nr (a_n g_nr^T) (b_n h_nr^T) = sum_n (a_n b_n^T) (x) (sum_r g_nr h_nr^T),

one matrix product with n rows in place of n R.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.linalg import product
from fisherflow_jax.structures._algebra.outer_products import OuterProducts

PyTree = Any


class _Pair(NamedTuple):
    """One leaf's vectors: inputs `(n, I)` times gradients `(n, R, O)`."""

    inputs: jax.Array
    gradients: jax.Array
    layout: Any  # .to_leaf((1, I, O)), or None: the leaf is (O,) in some shape
    shape: tuple[int, ...]  # of the leaf


def is_product(leaf: Any) -> bool:
    return isinstance(leaf, OuterProducts)


def held(stack: PyTree) -> int | None:
    """Numbers held at once for one example's vectors; None: vectors are no dearer."""
    leaves = jax.tree.leaves(stack, is_leaf=is_product)
    products = [leaf for leaf in leaves if is_product(leaf)]
    if not products or not all(_is_plain(leaf) for leaf in products):
        return None
    columns = products[0].gradients.shape[1]
    sides, size = [], 0
    for leaf in leaves:
        if is_product(leaf):
            sides.append((leaf.inputs.shape[-1], leaf.gradients.shape[-1]))
        else:
            sides.append((1, math.prod(leaf.shape[1:])))
        size += math.prod(sides[-1])
    entries = sum(max(side) ** 2 for side in zip(*sides, strict=True))
    if columns == 1 or not all(map(math.prod, sides)):
        return None
    return entries if entries <= columns * size else None


def _is_plain(leaf: OuterProducts) -> bool:
    return not leaf.one_hot and leaf.num_positions == 1 and leaf.inputs.shape[1] == 1


def rows(stack: PyTree) -> PyTree:
    """The matrix as a params-like tree of its stacked rows, each `(d, *leaf.shape)`."""
    leaves, treedef = jax.tree.flatten(stack, is_leaf=is_product)
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    count = next(leaf for leaf in leaves if is_product(leaf)).gradients.shape[0]
    pairs = [_pair(leaf, count, dtype) for leaf in leaves]
    blocks: dict[tuple[int, int], jax.Array] = {}
    for i, left in enumerate(pairs):
        for j, right in enumerate(pairs[: i + 1]):
            block = _block(left, right)
            blocks[i, j] = _in_leaf_order(block, left, right)
            if i != j:
                turned = jnp.transpose(block, (2, 3, 0, 1))
                blocks[j, i] = _in_leaf_order(turned, right, left)
    stacked = [
        jnp.concatenate([blocks[i, j] for i in range(len(pairs))])
        for j in range(len(pairs))
    ]
    return jax.tree.unflatten(treedef, stacked)


def _pair(leaf: Any, count: int, dtype: Any) -> _Pair:
    if is_product(leaf):
        inputs, gradients = leaf.inputs[:, 0, 0], leaf.gradients[:, :, 0, 0]
        shape = jax.eval_shape(
            leaf.layout.to_leaf,
            jax.ShapeDtypeStruct((1, inputs.shape[1], gradients.shape[2]), dtype),
        ).shape
        return _Pair(inputs.astype(dtype), gradients.astype(dtype), leaf.layout, shape)
    shape = leaf.shape[1:]
    gradients = leaf.reshape((count, leaf.shape[0] // count, -1))
    return _Pair(jnp.ones((count, 1), dtype), gradients.astype(dtype), None, shape)


def _block(left: _Pair, right: _Pair) -> jax.Array:
    """`(I, O, I', O')`."""
    inputs = left.inputs[:, :, None] * right.inputs[:, None, :]
    gradients = product("nro,nrp->nop", left.gradients, right.gradients)
    return product("nij,nop->iojp", inputs, gradients)


def _in_leaf_order(block: jax.Array, left: _Pair, right: _Pair) -> jax.Array:
    """`(I, O, I', O')` -> `(size of the left leaf, *shape of the right leaf)`."""
    columns = block.reshape((*block.shape[:2], -1))
    columns = _to_leaf(jnp.moveaxis(columns, -1, 0), left)
    size = left.gradients.shape[2] * left.inputs.shape[1]
    by_row = columns.reshape((-1, size)).T
    return _to_leaf(by_row.reshape((size, *block.shape[2:])), right)


def _to_leaf(stacked: jax.Array, pair: _Pair) -> jax.Array:
    """`(k, I, O)` -> `(k, *leaf.shape)`."""
    if pair.layout is None:
        return stacked.reshape((stacked.shape[0], *pair.shape))
    return jax.vmap(pair.layout.to_leaf)(stacked[:, None])

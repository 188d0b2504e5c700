"""Vectors of a linear layer, kept as the outer products that they are."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees
from fisherflow_jax._ground.linalg import product


@dataclasses.dataclass(frozen=True, eq=False)
class OuterProducts:
    r"""Vectors :math:`v_{nr} = \sum_t a_{nt} g_{nrt}^\top` of a linear layer's kernel.

    :math:`a` are the layer's inputs and :math:`g` the vectors pulled back to its
    outputs, at T positions that share the kernel (tokens, pixels, steps), in K copies
    stacked in one leaf (experts, layers of a scan, groups of a convolution). A leaf of
    the tree that a structure reduces, in place of an array `(n * R, *leaf.shape)`.
    They are made by `ff.estimators.exact`, of layers that were found.
    """

    inputs: jax.Array  # (n, K, T, I), or ids (n, K, T) where inputs are one-hot
    gradients: jax.Array  # (n, R, K, T, O), float32 or wider, times root of the weight
    weights: jax.Array  # (n,), of the examples, or (n, targets)
    num_inputs: int
    has_bias: bool  # whether the layer's bias sees the same gradients
    layout: Any  # .to_leaf((K, I, O)) -> like the leaf
    # of a tied kernel's transpose, (K, O, I); what it gives the vectors is added
    turned: "OuterProducts | None" = None

    @property
    def one_hot(self) -> bool:
        """Whether inputs are ids of rows: an embedding."""
        return self.inputs.ndim == 3

    @property
    def dtype(self) -> Any:
        return self.gradients.dtype

    @property
    def leaf_size(self) -> int:
        """The number of entries of the leaf."""
        return self.gradients.shape[2] * self.num_inputs * self.gradients.shape[4]

    @property
    def num_positions(self) -> int:
        return self.gradients.shape[3]

    @property
    def entries(self) -> int:
        """Numbers held at once by `squares`."""
        count, columns, stacked, positions, outputs = self.gradients.shape
        held = self.gradients.size + self.inputs.size
        if self.turned is not None:
            rows = self.inputs.size * self.num_inputs if self.one_hot else 0
            both = self.turned.gradients.size + self.turned.inputs.size
            return held + rows + both + 2 * count * columns * self.leaf_size
        if self.one_hot:
            return held + count * stacked * positions**2 + self.gradients.size
        if positions == 1:
            return held
        return held + count * columns * stacked * self.num_inputs * outputs

    def squares(self) -> jax.Array:
        """The sum over all vectors of their squared entries, like the leaf.

        Without sharing (T = 1) one product of squares, `(a^2)^T (sum_r g^2)`: no vector
        is formed.
        """
        if self.turned is None and self.one_hot:
            return self.layout.to_leaf(self._squares_of_rows())
        if self.turned is None and self.num_positions == 1:
            gradients = jnp.sum(jnp.square(self.gradients[:, :, :, 0]), axis=1)
            squares = product(
                "nki,nko->kio", jnp.square(self._wide_inputs()[:, :, 0]), gradients
            )
        else:
            squares = jnp.sum(jnp.square(self._products()), axis=(0, 1))
        return self.layout.to_leaf(squares)

    def sum_of_squares(self) -> jax.Array:
        """The sum of all squared entries of all vectors, a number."""
        _, _, _, positions, outputs = self.gradients.shape
        if self.turned is not None:
            return jnp.sum(self.squares())
        if self.one_hot:
            return jnp.sum(self.gradients * self._summed_by_id())
        # |sum_t a_t g_t^T|^2 = sum_ts (a_t . a_s) (g_t . g_s)
        if positions * (self.num_inputs + outputs) <= self.num_inputs * outputs:
            inputs = self._wide_inputs()
            gram = product("nkti,nksi->nkts", inputs, inputs)
            outer = product("nrkto,nrkso->nkts", self.gradients, self.gradients)
            return jnp.sum(gram * outer)
        return jnp.sum(self.squares())

    def _wide_inputs(self) -> jax.Array:
        return self.inputs.astype(self.gradients.dtype)

    def _products(self) -> jax.Array:
        """The vectors, `(n, R, K, I, O)`."""
        inputs = self._wide_inputs()
        if self.one_hot:  # an id out of bounds is no row
            inputs = jax.nn.one_hot(self.inputs, self.num_inputs, dtype=self.dtype)
        products = product("nkti,nrkto->nrkio", inputs, self.gradients)
        if self.turned is None:
            return products
        return products + jnp.swapaxes(self.turned._products(), -1, -2)

    def _of_kernels(self, rows: slice) -> "OuterProducts":
        """The vectors of some of the stacked kernels."""
        return dataclasses.replace(
            self,
            inputs=self.inputs[:, rows],
            gradients=self.gradients[:, :, rows],
            turned=self.turned and self.turned._of_kernels(rows),
        )

    def _summed_by_id(self) -> jax.Array:
        """At each position the sum of g over the positions with the same id."""
        same = self.inputs[:, :, :, None] == self.inputs[:, :, None, :]
        return product(
            "nkts,nrkso->nrkto", same.astype(self.gradients.dtype), self.gradients
        )

    def _squares_of_rows(self) -> jax.Array:
        stacked, outputs = self.gradients.shape[2], self.gradients.shape[4]
        # (sum over an id's positions of g)^2, spread over these positions
        shares = jnp.sum(self.gradients * self._summed_by_id(), axis=1)
        zeros = jnp.zeros((stacked, self.num_inputs, outputs), shares.dtype)
        copies = jnp.arange(stacked, dtype=jnp.int32)[None, :, None]
        copies = jnp.broadcast_to(copies, self.inputs.shape)
        return zeros.at[copies, self.inputs].add(shares, mode="drop")


@dataclasses.dataclass(frozen=True, eq=False)
class OneOfMany:
    """The vectors of one layer, among those of all layers that are alike.

    A leaf in place of `OuterProducts`, for the structures that say so; that of a bias
    which its layer merges is its kernel's.
    """

    many: OuterProducts
    rows: slice  # of the stacked kernels

    @property
    def dtype(self) -> Any:
        return self.many.dtype

    def alone(self) -> OuterProducts:
        return self.many._of_kernels(self.rows)


def side_by_side(every: Sequence[OuterProducts]) -> OuterProducts:
    """The vectors of layers that are alike, their kernels stacked."""
    turned = [x.turned for x in every if x.turned is not None]
    return dataclasses.replace(
        every[0],
        inputs=trees.concatenated([x.inputs for x in every], 1),
        gradients=trees.concatenated([x.gradients for x in every], 2),
        turned=side_by_side(turned) if turned else None,
    )


PyTree = Any
Vectors = jax.Array | OuterProducts


def squares(stack: Vectors, dtype: Any) -> jax.Array:
    """The squares of one leaf's vectors, summed over the vectors: like the leaf."""
    if isinstance(stack, OuterProducts):
        return stack.squares().astype(dtype)
    return jnp.sum(jnp.square(stack.astype(dtype)), 0)


def sum_of_squares(stack: Vectors, dtype: Any) -> jax.Array:
    """The squares of one leaf's vectors, summed over vectors and entries: a number."""
    if isinstance(stack, OuterProducts):
        return stack.sum_of_squares().astype(dtype)
    return jnp.sum(jnp.square(stack.astype(dtype)))


def leaf_size(stack: Vectors) -> int:
    """The number of entries of one leaf."""
    if isinstance(stack, OuterProducts):
        return stack.leaf_size
    return math.prod(stack.shape[1:])


# ---- the whole matrix, without forming the vectors
#
# With R vectors an example the products of two layers' vectors are
#
#     sum_nr (a_n g_nr^T) (b_n h_nr^T) = sum_n (a_n b_n^T) (x) (sum_r g_nr h_nr^T),
#
# one matrix product with n rows in place of n R.


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


def entering_and_returning(stack: PyTree) -> int:
    """Numbers held at once where only products of inputs, or of gradients, are made."""
    count = 0
    for leaf in jax.tree.leaves(stack, is_leaf=is_product):
        ways = [leaf, leaf.turned] if is_product(leaf) else []
        held = [w.inputs.size + w.gradients.size for w in ways if w is not None]
        count += sum(held) if ways else leaf.size
    return count


def _is_plain(leaf: OuterProducts) -> bool:
    simple = not leaf.one_hot and leaf.turned is None
    return simple and leaf.num_positions == 1 and leaf.inputs.shape[1] == 1


def rows(stack: PyTree) -> PyTree:
    """The matrix as a params-like tree of its stacked rows, each `(d, *leaf.shape)`."""
    leaves, treedef = jax.tree.flatten(stack, is_leaf=is_product)
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    count = next(leaf for leaf in leaves if is_product(leaf)).gradients.shape[0]
    pairs = [_pair(leaf, count, dtype) for leaf in leaves]
    blocks: dict[tuple[int, int], jax.Array] = {}
    for i, left in enumerate(pairs):
        for j, right in enumerate(pairs[: i + 1]):
            block = _in_leaf_order(_block(left, right), left, right)
            blocks[i, j] = block
            if i != j:
                turned = block.reshape((block.shape[0], -1)).T
                blocks[j, i] = turned.reshape((-1, *left.shape))
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
    by_row = _to_leaf(block.reshape((*block.shape[:2], -1)), left, axis=-1)
    by_row = by_row.reshape((math.prod(left.shape), *block.shape[2:]))
    return _to_leaf(by_row, right, axis=0)


def _to_leaf(values: jax.Array, pair: _Pair, axis: int) -> jax.Array:
    """`(I, O)` -> the leaf's shape, for every entry of a further axis."""

    def one(values: jax.Array) -> jax.Array:
        if pair.layout is None:
            return values.reshape(pair.shape)
        return pair.layout.to_leaf(values[None])

    return jax.vmap(one, axis, axis)(values)

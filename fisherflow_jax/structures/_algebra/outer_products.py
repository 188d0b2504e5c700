"""Vectors of a linear layer, kept as the outer products that they are."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.linalg import product


@dataclasses.dataclass(frozen=True, eq=False)
class OuterProducts:
    r"""Vectors :math:`v_{nr} = \sum_t a_{nt} g_{nrt}^\top` of a linear layer's kernel.

    :math:`a` are the layer's inputs and :math:`g` the vectors pulled back to its
    outputs, at T positions that share the kernel (tokens, pixels, steps), in K copies
    stacked in one leaf (experts, layers of a scan, groups of a convolution). A leaf of
    the tree that a structure reduces, in place of an array `(n * R, *leaf.shape)`.
    """

    inputs: jax.Array  # (n, K, T, I), or ids (n, K, T) where inputs are one-hot
    gradients: jax.Array  # (n, R, K, T, O), float32 or wider, times root of the weight
    weights: jax.Array  # (n,), multiplicities of the examples
    num_inputs: int
    has_bias: bool  # whether the layer's bias sees the same gradients
    layout: Any  # .to_leaf((K, I, O)) -> like the leaf

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
        if self.one_hot:
            return self.layout.to_leaf(self._squares_of_rows())
        if self.num_positions == 1:
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
        return product("nkti,nrkto->nrkio", self._wide_inputs(), self.gradients)

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

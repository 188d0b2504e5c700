"""Matrices and diagonals as columns of parameters, for `ff.information.by_columns`."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees

PyTree = Any


def uncoupled(entries: jax.Array) -> ops.ColumnBlocks:
    """A column `(I,)` of which no two entries are known together."""
    one = jnp.ones((1, 1), entries.dtype)
    return ops.ColumnBlocks(entries[None], one, jnp.zeros((1,), entries.dtype))


def each_by_itself(information: Any, like: PyTree | None = None) -> ops.ByColumns:
    """Of an information that is diagonal."""
    entries = ops.diagonal(information, like)
    flat = trees.ravel(entries)
    return ops.ByColumns(
        [uncoupled(flat)],
        lambda vector: [trees.ravel(vector).astype(flat.dtype)[None, :, None]],
        lambda parts: trees.unravel(parts[0].reshape(-1), entries),
    )


def of_matrices(
    blocks: list[jax.Array],
    pack: Callable[[PyTree], list[jax.Array]],
    unpack: Callable[[Iterable[jax.Array]], PyTree],
) -> ops.ByColumns:
    """Of matrices `(..., k, k)`, with a vector as `(..., k)` beside each and back."""

    def group(block: jax.Array) -> ops.ColumnBlocks:
        matrix = block.reshape((math.prod(block.shape[:-2]), *block.shape[-2:]))
        ones = jnp.ones((len(matrix), 1), block.dtype)
        return ops.ColumnBlocks(matrix, ones, jnp.zeros_like(ones[:, 0]))

    def split(vector: PyTree) -> list[jax.Array]:
        packed = pack(vector)
        return [x.reshape((math.prod(x.shape[:-1]), x.shape[-1], 1)) for x in packed]

    def join(parts: list[jax.Array]) -> PyTree:
        pairs = zip(parts, blocks, strict=True)
        return unpack([part.reshape(block.shape[:-1]) for part, block in pairs])

    return ops.ByColumns([group(block) for block in blocks], split, join)

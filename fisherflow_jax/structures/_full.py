"""The whole matrix."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.choices import choice
from fisherflow_jax._ground.holes import punch, shown_leaves
from fisherflow_jax.structures import _structure as structure
from fisherflow_jax.structures._algebra import dense, gram
from fisherflow_jax.structures._algebra.basis import map_basis
from fisherflow_jax.structures._compensated import Compensated
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Full(NamedTuple):
    """Information kept whole, as a params-like tree of its stacked rows."""

    rows: PyTree  # leaf (d, *leaf.shape): row i of the matrix, unravelled


dense.register(Full)


@ops.add_to.register
def _(left: Full, right: Any) -> Full:
    if isinstance(right, Full):
        return Full(jax.tree.map(jnp.add, left.rows, right.rows))
    if isinstance(right, Compensated):
        return NotImplemented
    # every structure is a matrix, so this one can hold the sum
    like = jax.tree.map(lambda x: x[0], left.rows)
    matrix = dense.matrices(left)[0]
    return from_matrix(matrix + ops.to_dense(right, like).astype(matrix.dtype), like)


def from_matrix(matrix: jax.Array, like: PyTree) -> Full:
    """The information with the dense `matrix (d, d)`, in the order of `ravel`."""
    return Full(trees.unravel(matrix, like))


@choice
def full() -> Structure:
    r"""Keeps the whole `d x d` information: exact.

    Returns:
      A `Structure` whose information is a `Full`. Memory d^2; a solve costs d^3/3 once
      and d^2 for each vector; a batch of n examples with R outputs adds n R d^2, or
      n d^2 where linear layers are used at one position an example.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.structures.full().reduce(jnp.array([[1.0, 2.0]])).rows
      Array([[1., 2.],
             [2., 4.]], dtype=float32)
    """

    def reduce(stack: PyTree) -> Full:
        if any(map(gram.is_product, jax.tree.leaves(stack, is_leaf=gram.is_product))):
            return Full(gram.rows(stack))
        flat = trees.ravel(stack, 1)
        like = jax.tree.map(lambda x: x[0], stack)
        return from_matrix(flat.T @ flat, like)

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Full:
        dtype = trees.float_dtype(params)
        identity = jnp.eye(trees.size(params), dtype=dtype)
        return from_matrix(jnp.asarray(value, dtype) * identity, params)

    def from_matvec(matvec: Any, params: PyTree) -> Full:
        rows = map_basis(matvec, params, lambda column, index: column)
        return from_matrix((rows + rows.T) / 2, params)

    return Structure(
        "full()",
        reduce,
        isotropic,
        supports=structure.OF_A_MATRIX | {structure.ADAPTIVE},
        from_matvec=from_matvec,
        from_full=lambda information: information,
        held_by_outer_products=gram.held,
    )


@dense.matrices.register
def _(information: Full) -> dense.Matrices:
    return [trees.ravel(information.rows, 1)]


@dense.with_matrices.register
def _(information: Full, blocks: list) -> Full:
    return from_matrix(blocks[0], _template(information))


@dense.pack.register
def _(information: Full, vector: PyTree) -> list:
    return [trees.ravel(dense.cast(vector, information))]


@dense.unpack.register
def _(information: Full, parts: list) -> PyTree:
    return trees.unravel(parts[0], _template(information))


def _template(information: Full) -> PyTree:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), information.rows
    )


def places_shown(columns: list[jax.Array], is_shown: list[bool]) -> np.ndarray:
    """Positions of the shown leaves in a matrix whose columns are `(d, *leaf)`."""
    flags = [
        np.full(math.prod(x.shape[1:]), flag)
        for x, flag in zip(columns, is_shown, strict=True)
    ]
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *flags])).astype(np.int32)


@ops.restrict.register
def _(information: Full, shown: PyTree, like: PyTree | None = None) -> Full:
    rows = information.rows
    positions = places_shown(jax.tree.leaves(rows), shown_leaves(rows, shown))
    return Full(jax.tree.map(lambda x: x[positions], punch(rows, shown)))


@ops.restrict.register(object)
def _restrict_dense(
    information: Any, shown: PyTree, like: PyTree | None = None
) -> Full:
    """For a structure without its own: rows and columns of its matrix."""
    matrix = ops.dense_matrix(information, like, "a restriction")
    like = jax.eval_shape(ops.diagonal, information) if like is None else like
    return ops.restrict(from_matrix(matrix, like), shown)

"""The whole matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import choices, trees
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._algebra import dense, outer_products, steps
from fisherflow_jax.structures._compensated import is_of_value
from fisherflow_jax.structures._structure import Structure

PyTree = Any


class Full(NamedTuple):
    """Information kept whole, as a params-like tree of its stacked rows.

    Kept by `ff.structures.full`.
    """

    rows: PyTree  # leaf (d, *leaf.shape): row i of the matrix, unravelled


dense.register(Full)
steps.register(Full)
ops.to_dense.register(Full, lambda i, like=None: trees.ravel(i.rows, 1))
ops.facts.register(Full, lambda information: ops.Facts(dense=True, whole=True))


@ops.add_to.register
def _(left: Full, right: Any) -> Full:
    if isinstance(right, Full):
        return Full(jax.tree.map(jnp.add, left.rows, right.rows))
    if is_of_value(right):
        return NotImplemented
    # every structure is a matrix, so this one can hold the sum
    like = jax.tree.map(lambda x: x[0], left.rows)
    matrix = trees.ravel(left.rows, 1)
    return from_matrix(matrix + ops.to_dense(right, like).astype(matrix.dtype), like)


def from_matrix(matrix: jax.Array, like: PyTree) -> Full:
    """The information with the dense `matrix (d, d)`, in the order of `ravel`."""
    return Full(trees.unravel(matrix, like))


@choices.choice
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

    kept = dense.structure("full()", _empty, capabilities.ADAPTIVE)

    def reduce(stack: PyTree) -> Full:
        is_product = outer_products.is_product
        if any(map(is_product, jax.tree.leaves(stack, is_leaf=is_product))):
            return Full(outer_products.rows(stack))
        return kept.reduce(stack)

    return kept._replace(
        reduce=reduce,
        from_full=lambda information: information,
        held_by_outer_products=outer_products.held,
    )


def _empty(params: PyTree) -> Full:
    """The shapes of a whole matrix."""
    sizes = jax.tree.map(lambda _: trees.size(params), params)
    return Full(dense.empty_rows(params, sizes))


@dense.layout.register
def _(information: Full) -> dense.Layout:
    leaves = [*range(len(jax.tree.leaves(information.rows)))]
    groups: dict[str | None, list[int]] = {None: leaves} if leaves else {}
    return dense.Layout(information.rows, groups, False, Full)


@ops.restrict.register(object)
def _(information: Any, shown: PyTree, like: PyTree | None = None) -> Full:
    """For a structure without its own: rows and columns of its matrix."""
    matrix = ops.dense_matrix(information, like, "a restriction")
    return ops.restrict(from_matrix(matrix, ops.shapes(information, like)), shown)


@ops.by_columns.register(object)
def _(information: Any, like: PyTree | None = None) -> ops.ByColumns:
    """For a structure without its own: its matrix."""
    matrix = ops.dense_matrix(information, like, "the matrix of all columns")
    return ops.by_columns(from_matrix(matrix, ops.shapes(information, like)))


@ops.embed.register(object)
def _(
    information: Any,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> Full:
    """For a structure without its own: its matrix, in a larger one."""
    matrix = ops.dense_matrix(information, like, "a larger one")
    return ops.embed(from_matrix(matrix, ops.shapes(information, like)), entries)


@ops.embed.register
def _(
    information: Full,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> Full:
    return dense.embedded(information, _empty(entries), entries)

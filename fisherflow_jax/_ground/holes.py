"""Trees with holes, as `optax.masked` and `optax.partition` show them."""

import functools
from typing import Any

import jax
import optax

PyTree = Any


def is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


# of a tree with holes, and of another beside it
_map = functools.partial(jax.tree.map, is_leaf=is_hole)


def has_holes(tree: PyTree) -> bool:
    return any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole)))


def punch(whole: PyTree, holed: PyTree) -> PyTree:
    """`whole` without what lies at the holes of `holed`."""
    return _map(lambda node, part: node if is_hole(node) else part, holed, whole)


def fill_with_zeros(holed: PyTree, whole: PyTree) -> PyTree:
    """`holed` with zeros like `whole` at its holes; without any, as it is."""
    if not has_holes(holed):
        return holed
    zeros = optax.tree.zeros_like
    return _map(lambda node, x: zeros(x) if is_hole(node) else node, holed, whole)


def shown_leaves(whole: PyTree, holed: PyTree) -> list[bool]:
    """Whether `holed` shows it, for each leaf of `whole`."""
    marked = jax.tree.broadcast(holed, whole, is_leaf=is_hole)
    return [not is_hole(node) for node in jax.tree.leaves(marked, is_leaf=is_hole)]

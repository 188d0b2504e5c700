"""Trees with holes, as `optax.masked` and `optax.partition` show them."""

from typing import Any

import jax
import optax

PyTree = Any


def is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def has_holes(tree: PyTree) -> bool:
    return any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole)))


def punch(whole: PyTree, holed: PyTree) -> PyTree:
    """`whole` without what lies at the holes of `holed`."""
    return jax.tree.map(
        lambda node, part: node if is_hole(node) else part,
        holed,
        whole,
        is_leaf=is_hole,
    )


def fill_with_zeros(holed: PyTree, whole: PyTree) -> PyTree:
    """`holed` with zeros like `whole` at its holes."""
    return jax.tree.map(
        lambda node, part: optax.tree.zeros_like(part) if is_hole(node) else node,
        holed,
        whole,
        is_leaf=is_hole,
    )


def shown_leaves(whole: PyTree, holed: PyTree) -> list[bool]:
    """Whether `holed` shows it, for each leaf of `whole`."""
    marked = jax.tree.map(
        lambda node, part: jax.tree.map(lambda _: not is_hole(node), part),
        holed,
        whole,
        is_leaf=is_hole,
    )
    return jax.tree.leaves(marked)

"""The information about some of the parameters, the others being held.

`optax.masked` and `optax.partition` show a transformation a tree with holes. An
estimator runs the model, and so informs about the whole tree: what belongs to the holes
is taken out.
"""

import functools
from typing import Any

import jax
import numpy as np
import optax

from fisherflow_jax.structures import (
    Block,
    Diagonal,
    EigenKronecker,
    Full,
    Kronecker,
    LowRank,
    Scalar,
    UnitBlock,
)
from fisherflow_jax.structures._block import Grouped

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


@functools.singledispatch
def restrict(information: Any, holed: PyTree) -> Any:
    """The rows and columns of the parameters that `holed` shows."""
    raise TypeError(
        f"a {type(information).__name__} information has no restriction to some of "
        "the parameters, which optax.masked and optax.partition need."
    )


def _as_it_is(information: Any, holed: PyTree) -> Any:
    # one number for all parameters, and layers by name, fit a tree with holes
    return information


for _kind in (Scalar, Kronecker, EigenKronecker):
    restrict.register(_kind, _as_it_is)


@restrict.register
def _(information: Diagonal, holed: PyTree) -> Diagonal:
    return Diagonal(punch(information.entries, holed))


@restrict.register
def _(information: UnitBlock, holed: PyTree) -> UnitBlock:
    return UnitBlock(punch(information.units, holed))


@restrict.register
def _(information: LowRank, holed: PyTree) -> LowRank:
    return LowRank(punch(information.base, holed), punch(information.factors, holed))


def _shown(columns: list[jax.Array], is_shown: list[bool]) -> np.ndarray:
    """Positions of the shown leaves in a matrix whose columns are `(d, *leaf)`."""
    flags = [
        np.full(int(np.prod(x.shape[1:])), flag)
        for x, flag in zip(columns, is_shown, strict=True)
    ]
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *flags])).astype(np.int32)


def _shown_leaves(whole: PyTree, holed: PyTree) -> list[bool]:
    marked = jax.tree.map(
        lambda node, part: jax.tree.map(lambda _: not is_hole(node), part),
        holed,
        whole,
        is_leaf=is_hole,
    )
    return jax.tree.leaves(marked)


@restrict.register
def _(information: Full, holed: PyTree) -> Full:
    rows = information.rows
    positions = _shown(jax.tree.leaves(rows), _shown_leaves(rows, holed))
    return Full(jax.tree.map(lambda x: x[positions], punch(rows, holed)))


@restrict.register
def _(information: Block, holed: PyTree) -> Block:
    groups = information.groups
    leaves = jax.tree.leaves(groups, is_leaf=lambda node: isinstance(node, Grouped))
    shown = _shown_leaves(groups, holed)
    members: dict[str, list[tuple[jax.Array, bool]]] = {}
    for leaf, flag in zip(leaves, shown, strict=True):
        ((name, columns),) = leaf.rows.items()
        members.setdefault(name, []).append((columns, flag))
    positions = {
        name: _shown([x for x, _ in group], [flag for _, flag in group])
        for name, group in members.items()
    }

    def cut(node: Grouped) -> Grouped:
        return Grouped({name: x[positions[name]] for name, x in node.rows.items()})

    return Block(
        jax.tree.map(
            cut, punch(groups, holed), is_leaf=lambda node: isinstance(node, Grouped)
        )
    )

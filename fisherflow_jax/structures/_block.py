"""Blocks on the diagonal: groups of leaves, or the output units of each leaf."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import choices, trees
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._algebra import dense, steps
from fisherflow_jax.structures._structure import Structure

PyTree = Any
Partition = PyTree | Callable[[str], str]


class Block(NamedTuple):
    """Information in one dense block a group of leaves.

    Kept by `ff.structures.block`.
    """

    # of each group: like the parameters, a leaf's columns of the matrix,
    # (d_group, *leaf.shape), and None beside leaves of other groups
    groups: dict[str, PyTree]


class UnitBlock(NamedTuple):
    """Information in one dense block an output unit (last axis) of each leaf.

    Kept by `ff.structures.block`.
    """

    units: PyTree  # leaf (m, *leaf.shape), m = leaf.size / units: rows of each block


dense.register(Block)
steps.register(Block)
dense.register(UnitBlock)
steps.register(UnitBlock)


@choices.choice
def block(partition: Partition | None = None) -> Structure:
    r"""Keeps dense blocks on the diagonal of the information.

    Args:
      partition: None: one block for each output unit (last axis) of each leaf, so that
        a kernel `(inputs, units)` has `units` blocks of `inputs x inputs`. A pytree
        like the parameters whose leaves are group names (a prefix will do), or a
        function from a parameter's name (such as `"layers.0.weight"`) to a
        group name: leaves that share a name share a block.

    Returns:
      A `Structure`. Memory: the sum of the squared block sizes; a solve costs the sum
      of their cubes. Exact when the information is block-diagonal.

    Raises:
      ValueError: at `init`, if the partition does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
      >>> units = ff.structures.block().isotropic(params, 1.0)
      >>> units.units["w"].shape  # two units, each a 3 x 3 block
      (3, 3, 2)
      >>> layer = ff.structures.block(lambda path: "layer")
      >>> layer.isotropic(params, 1.0).groups["layer"]["w"].shape
      (8, 3, 2)
    """
    if partition is None:
        return dense.structure("block()", _units, capabilities.MARGINAL)
    groups = functools.partial(_groups, partition)
    return dense.structure("block(partition)", groups, capabilities.MARGINAL)


# ---- groups of leaves


def _names(tree: PyTree, partition: Partition) -> list[str]:
    parameters = [name for name, _ in trees.named_leaves(tree)]
    if callable(partition):
        names = [partition(name) for name in parameters]
    else:
        try:
            names = jax.tree.leaves(jax.tree.broadcast(partition, tree))
        except ValueError as error:
            raise ValueError(
                "partition must be a pytree of group names like the parameters, or a "
                f"prefix of it: {error}"
            ) from error
    for parameter, name in zip(parameters, names, strict=True):
        if not isinstance(name, str):
            raise ValueError(
                f"partition must name groups by strings; got {name!r} for parameter "
                f"{parameter}."
            )
    return names


def _groups(partition: Partition, params: PyTree) -> Block:
    """The shapes of a block for each group."""
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:  # optax.tree.map_params builds states on such a tree
        return Block(params)
    names, sizes = _names(params, partition), collections.Counter[str]()
    for name, leaf in zip(names, leaves, strict=True):
        sizes[name] += leaf.size
    rows = dense.empty_rows(leaves, [sizes[name] for name in names])
    return _by_group(names, rows, treedef)


def _by_group(names: list, rows: list, treedef: Any) -> Block:
    def tree(name: str) -> PyTree:
        pairs = zip(names, rows, strict=True)
        return jax.tree.unflatten(treedef, [x if n == name else None for n, x in pairs])

    return Block({name: tree(name) for name in dict.fromkeys(names) if name})


def _flat(tree: PyTree) -> tuple[list, Any]:
    return jax.tree.flatten(tree, is_leaf=lambda node: node is None)


@dense.layout.register
def _(information: Block) -> dense.Layout:
    if not jax.tree.leaves(information.groups):
        return dense.Layout(information.groups, {}, False, Block)
    named = {name: _flat(tree) for name, tree in information.groups.items()}
    treedef = next(iter(named.values()))[1]
    columns = zip(*(leaves for leaves, _ in named.values()), strict=True)
    pairs = [dict(zip(named, column, strict=True)) for column in columns]
    # a parameter that is None has no columns at all
    names = [next((n for n, x in p.items() if x is not None), None) for p in pairs]
    rows = [None if n is None else p[n] for n, p in zip(names, pairs, strict=True)]
    groups: dict[str | None, list[int]] = {}
    for index, name in enumerate(filter(None, names)):
        groups.setdefault(name, []).append(index)

    def build(tree: PyTree) -> Block:
        return _by_group(names, _flat(tree)[0], treedef)

    return dense.Layout(jax.tree.unflatten(treedef, rows), groups, False, build)


@ops.restrict.register
def _(information: Block, shown: PyTree, like: PyTree | None = None) -> Block:
    built = dense.layout(information).build(dense.rows_shown(information, shown))
    parts = {name: trees.punch(x, shown) for name, x in built.groups.items()}
    return Block({name: x for name, x in parts.items() if jax.tree.leaves(x)})


@ops.embed.register
def _(
    information: Block,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> Block:
    if not isinstance(template, Block):
        groups = {
            leaf: name
            for name, tree in information.groups.items()
            for leaf, _ in trees.named_leaves(tree)
        }
        new = [leaf for leaf, _ in trees.named_leaves(entries) if leaf not in groups]
        if new:
            raise ValueError(
                f"which block {', '.join(new)} belongs to is not known: give structure="
                "ff.structures.block(partition), with a partition of all parameters."
            )
        template = _groups(groups.__getitem__, entries)
    return dense.embedded(information, template, entries)


# ---- output units of each leaf


def _units(params: PyTree) -> UnitBlock:
    """The shapes of a block for each unit."""
    sizes = jax.tree.map(lambda x: math.prod(x.shape[:-1]), params)
    return UnitBlock(dense.empty_rows(params, sizes))


@dense.layout.register
def _(information: UnitBlock) -> dense.Layout:
    count = len(jax.tree.leaves(information.units))
    groups: dict[str | None, list[int]] = {str(i): [i] for i in range(count)}
    return dense.Layout(information.units, groups, True, UnitBlock)


@ops.embed.register
def _(
    information: UnitBlock,
    entries: PyTree,
    like: PyTree | None = None,
    template: Any | None = None,
) -> UnitBlock:
    return dense.embedded(information, _units(entries), entries)

"""Blocks on the diagonal: groups of leaves, or the output units of each leaf."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fisherflow_jax._ground import choices, trees
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._algebra import dense
from fisherflow_jax.structures._structure import Structure

PyTree = Any
Partition = PyTree | Callable[[str], str]


class Grouped(NamedTuple):
    """One leaf's columns of its group's matrix; the group's name is the key."""

    rows: dict[str, jax.Array]  # {group: (d_group, *leaf.shape)}


class Block(NamedTuple):
    """Information in one dense block a group of leaves."""

    groups: PyTree  # like the parameters, each leaf a Grouped


class UnitBlock(NamedTuple):
    """Information in one dense block an output unit (last axis) of each leaf."""

    units: PyTree  # leaf (m, *leaf.shape), m = leaf.size / units: rows of each block


dense.register(Block)
dense.register(UnitBlock)


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
      >>> layer.isotropic(params, 1.0).groups["w"].rows["layer"].shape
      (8, 3, 2)
    """
    if partition is None:
        return dense.structure("block()", _units, capabilities.MARGINAL)
    groups = functools.partial(_groups, partition)
    return dense.structure("block(partition)", groups, capabilities.MARGINAL)


# ---- groups of leaves


def _names(tree: PyTree, partition: Partition) -> list[str]:
    parameters = [name for name, _ in trees.named_leaves(tree)]
    if not parameters:
        return []  # optax.tree.map_params builds states on a tree without leaves
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
    names, sizes = _names(params, partition), collections.Counter[str]()
    for name, leaf in zip(names, leaves, strict=True):
        sizes[name] += leaf.size
    rows = dense.empty_rows(leaves, [sizes[name] for name in names])
    grouped = [Grouped({n: row}) for n, row in zip(names, rows, strict=True)]
    return Block(jax.tree.unflatten(treedef, grouped))


def _is_grouped(node: Any) -> bool:
    return isinstance(node, Grouped)


@dense.layout.register
def _(information: Block) -> dense.Layout:
    leaves, treedef = jax.tree.flatten(information.groups, is_leaf=_is_grouped)
    groups: dict[str | None, list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(next(iter(leaf.rows)), []).append(index)
    names = {i: name for name, group in groups.items() for i in group}

    def build(tree: PyTree) -> Block:
        rows = enumerate(jax.tree.leaves(tree))
        grouped = [Grouped({str(names[i]): row}) for i, row in rows]
        return Block(jax.tree.unflatten(treedef, grouped))

    rows = [next(iter(leaf.rows.values())) for leaf in leaves]
    return dense.Layout(jax.tree.unflatten(treedef, rows), groups, False, build)


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

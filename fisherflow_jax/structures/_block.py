"""Blocks on the diagonal: groups of leaves, or the output units of each leaf."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import trees
from fisherflow_jax._ground.choices import choice
from fisherflow_jax.structures import capabilities
from fisherflow_jax.structures._algebra import dense
from fisherflow_jax.structures._full import Full
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


@choice
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
    return _units() if partition is None else _groups(partition)


def _structure(name: str, reduce: Callable, isotropic: Callable) -> Structure:
    def from_full(full: Full) -> Any:
        like = jax.tree.map(lambda x: x[0], full.rows)
        return dense.of_matrix(isotropic(like, 0.0), dense.matrices(full)[0])

    return Structure(
        name=name,
        reduce=reduce,
        isotropic=isotropic,
        supports=capabilities.OF_A_MATRIX | {capabilities.MARGINAL},
        from_matvec=lambda matvec, params: dense.of_matvec(
            isotropic(params, 0.0), matvec, params
        ),
        from_full=from_full,
    )


# ---- groups of leaves


def _names(tree: PyTree, partition: Partition) -> list[str]:
    parameters = [name for name, _ in trees.named_leaves(tree)]
    if not parameters:
        return []  # optax.tree.map_params builds states on a tree without leaves
    if callable(partition):
        names = [partition(name) for name in parameters]
    else:
        try:
            filled = jax.tree.map(
                lambda name, part: jax.tree.map(lambda _: name, part), partition, tree
            )
        except ValueError as error:
            raise ValueError(
                "partition must be a pytree of group names like the parameters, or a "
                f"prefix of it: {error}"
            ) from error
        names = jax.tree.leaves(filled)
    for parameter, name in zip(parameters, names, strict=True):
        if not isinstance(name, str):
            raise ValueError(
                f"partition must name groups by strings; got {name!r} for parameter "
                f"{parameter}."
            )
    return names


def _groups(partition: Partition) -> Structure:
    def build(tree: PyTree, matrix_of: Callable[[list], jax.Array]) -> Block:
        """`matrix_of(leaf indices)` -> the group's matrix."""
        leaves, treedef = jax.tree.flatten(tree)
        names = _names(tree, partition)
        grouped: list[Any] = [None] * len(leaves)
        for name in dict.fromkeys(names):
            members = [i for i, n in enumerate(names) if n == name]
            rows = trees.unravel(matrix_of(members), [leaves[i] for i in members])
            for index, row in zip(members, rows, strict=True):
                grouped[index] = Grouped({name: row})
        return Block(jax.tree.unflatten(treedef, grouped))

    def reduce(stack: PyTree) -> Block:
        leaves = jax.tree.leaves(stack)

        def gram(members: list[int]) -> jax.Array:
            flat = trees.ravel([leaves[i] for i in members], 1)
            return (flat.T @ flat).astype(trees.float_dtype(stack))

        return build(jax.tree.map(lambda x: x[0], stack), gram)

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> Block:
        leaves, dtype = jax.tree.leaves(params), trees.float_dtype(params)

        def identity(members: list[int]) -> jax.Array:
            count = trees.size([leaves[i] for i in members])
            return jnp.asarray(value, dtype) * jnp.eye(count, dtype=dtype)

        return build(params, identity)

    return _structure("block(partition)", reduce, isotropic)


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


def _inputs_and_units(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _units() -> Structure:
    def reduce(stack: PyTree) -> UnitBlock:
        dtype = trees.float_dtype(stack)

        def leaf(x: jax.Array) -> jax.Array:
            inputs, units = _inputs_and_units(x.shape[1:])
            flat = x.reshape((x.shape[0], inputs, units)).astype(dtype)
            gram = jnp.einsum("kau,kbu->abu", flat, flat)
            return gram.reshape((inputs, *x.shape[1:]))

        return UnitBlock(jax.tree.map(leaf, stack))

    def isotropic(params: PyTree, value: jax.typing.ArrayLike) -> UnitBlock:
        dtype = trees.float_dtype(params)

        def leaf(x: jax.Array) -> jax.Array:
            inputs, units = _inputs_and_units(x.shape)
            identity = jnp.asarray(value, dtype) * jnp.eye(inputs, dtype=dtype)
            every = jnp.broadcast_to(identity[:, :, None], (inputs, inputs, units))
            return every.reshape((inputs, *x.shape))

        return UnitBlock(jax.tree.map(leaf, params))

    return _structure("block()", reduce, isotropic)


@dense.layout.register
def _(information: UnitBlock) -> dense.Layout:
    count = len(jax.tree.leaves(information.units))
    groups: dict[str | None, list[int]] = {str(i): [i] for i in range(count)}
    return dense.Layout(information.units, groups, True, UnitBlock)

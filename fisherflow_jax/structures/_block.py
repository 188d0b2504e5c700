"""Blocks on the diagonal: groups of leaves, or the output units of each leaf."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.choices import choice
from fisherflow_jax._ground.holes import punch, shown_leaves
from fisherflow_jax.structures import _structure as structure
from fisherflow_jax.structures._algebra import dense
from fisherflow_jax.structures._algebra.basis import map_basis
from fisherflow_jax.structures._full import Full, places_shown
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

_SUPPORTS = structure.OF_A_MATRIX | {structure.MARGINAL}


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

    def from_matvec(matvec: Any, params: PyTree) -> Block:
        information = isotropic(params, 0.0)
        places = dense.places(information)
        # row i of its own block only: d products, but never d x d numbers at once
        blocks = []
        for place in places:

            def read(column: jax.Array, _: jax.Array, place: Any = place) -> jax.Array:
                return column[place]

            rows = map_basis(matvec, params, read, indices=place)
            blocks.append((rows + rows.T) / 2)
        return dense.with_matrices(information, blocks)

    def from_full(information: Full) -> Block:
        matrix = dense.matrices(information)[0]
        like = jax.tree.map(lambda x: x[0], information.rows)
        zeros = isotropic(like, 0.0)
        blocks = [matrix[p[:, None], p[None, :]] for p in dense.places(zeros)]
        return dense.with_matrices(zeros, blocks)

    return Structure(
        "block(partition)",
        reduce,
        isotropic,
        _SUPPORTS,
        from_matvec,
        from_full,
    )


def _is_grouped(node: Any) -> bool:
    return isinstance(node, Grouped)


def _members(information: Block) -> tuple[dict[str, list[int]], list, Any]:
    leaves, treedef = jax.tree.flatten(information.groups, is_leaf=_is_grouped)
    members: dict[str, list[int]] = {}
    for index, leaf in enumerate(leaves):
        members.setdefault(next(iter(leaf.rows)), []).append(index)
    rows = [next(iter(leaf.rows.values())) for leaf in leaves]
    return members, rows, treedef


@dense.matrices.register
def _(information: Block) -> dense.Matrices:
    members, rows, _ = _members(information)
    return [trees.ravel([rows[i] for i in group], 1) for group in members.values()]


@dense.with_matrices.register
def _(information: Block, blocks: list) -> Block:
    members, rows, treedef = _members(information)
    grouped: list[Any] = [None] * len(rows)
    for (name, group), matrix in zip(members.items(), blocks, strict=True):
        likes = [jax.ShapeDtypeStruct(rows[i].shape[1:], matrix.dtype) for i in group]
        for index, row in zip(group, trees.unravel(matrix, likes), strict=True):
            grouped[index] = Grouped({name: row})
    return Block(jax.tree.unflatten(treedef, grouped))


@dense.pack.register
def _(information: Block, vector: PyTree) -> list:
    members, _, _ = _members(information)
    leaves = jax.tree.leaves(dense.cast(vector, information))
    return [trees.ravel([leaves[i] for i in group]) for group in members.values()]


@dense.unpack.register
def _(information: Block, parts: list) -> PyTree:
    members, rows, treedef = _members(information)
    leaves: list[Any] = [None] * len(rows)
    for group, part in zip(members.values(), parts, strict=True):
        likes = [jax.ShapeDtypeStruct(rows[i].shape[1:], part.dtype) for i in group]
        for index, leaf in zip(group, trees.unravel(part, likes), strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves)


@dense.block_parts.register
def _(information: Block) -> list[tuple[str, int]]:
    members, rows, _ = _members(information)
    found: list[Any] = [None] * len(rows)
    for name, group in members.items():
        for index in group:
            found[index] = name, rows[index].size * rows[index].shape[0]
    return found


@ops.restrict.register
def _(information: Block, shown: PyTree, like: PyTree | None = None) -> Block:
    groups = information.groups
    members, rows, _ = _members(information)
    flags = shown_leaves(groups, shown)
    positions = {
        name: places_shown([rows[i] for i in group], [flags[i] for i in group])
        for name, group in members.items()
    }

    def cut(node: Grouped) -> Grouped:
        return Grouped({name: x[positions[name]] for name, x in node.rows.items()})

    return Block(jax.tree.map(cut, punch(groups, shown), is_leaf=_is_grouped))


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

    def from_matvec(matvec: Any, params: PyTree) -> UnitBlock:
        information = isotropic(params, 0.0)
        blocks = []
        for place in dense.places(information):  # (units, m)
            units, inputs = place.shape
            unit_of = jnp.repeat(jnp.asarray(place), inputs, axis=0)

            def read(column: jax.Array, position: jax.Array, unit_of=unit_of):
                return column[unit_of[position]]

            rows = map_basis(matvec, params, read, indices=place.reshape(-1))
            rows = rows.reshape((units, inputs, inputs))
            blocks.append((rows + jnp.swapaxes(rows, -1, -2)) / 2)
        return dense.with_matrices(information, blocks)

    def from_full(information: Full) -> UnitBlock:
        matrix = dense.matrices(information)[0]
        like = jax.tree.map(lambda x: x[0], information.rows)
        zeros = isotropic(like, 0.0)
        blocks = [matrix[p[..., :, None], p[..., None, :]] for p in dense.places(zeros)]
        return dense.with_matrices(zeros, blocks)

    return Structure("block()", reduce, isotropic, _SUPPORTS, from_matvec, from_full)


@dense.matrices.register
def _(information: UnitBlock) -> dense.Matrices:
    def leaf(rows: jax.Array) -> jax.Array:
        inputs, units = rows.shape[0], _inputs_and_units(rows.shape[1:])[1]
        return jnp.moveaxis(rows.reshape((inputs, inputs, units)), -1, 0)

    return [leaf(rows) for rows in jax.tree.leaves(information.units)]


@dense.with_matrices.register
def _(information: UnitBlock, blocks: list) -> UnitBlock:
    leaves, treedef = jax.tree.flatten(information.units)
    rows = [
        jnp.moveaxis(block, 0, -1).reshape(leaf.shape)
        for block, leaf in zip(blocks, leaves, strict=True)
    ]
    return UnitBlock(jax.tree.unflatten(treedef, rows))


@dense.pack.register
def _(information: UnitBlock, vector: PyTree) -> list:
    leaves = jax.tree.leaves(information.units)
    parts = jax.tree.leaves(dense.cast(vector, information))
    return [
        part.reshape(_inputs_and_units(rows.shape[1:])).T
        for part, rows in zip(parts, leaves, strict=True)
    ]


@dense.unpack.register
def _(information: UnitBlock, parts: list) -> PyTree:
    leaves, treedef = jax.tree.flatten(information.units)
    shaped = [p.T.reshape(x.shape[1:]) for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


@dense.block_parts.register
def _(information: UnitBlock) -> list[tuple[str, int]]:
    leaves = enumerate(jax.tree.leaves(information.units))
    return [(str(index), rows.size * rows.shape[0]) for index, rows in leaves]


@ops.restrict.register
def _(information: UnitBlock, shown: PyTree, like: PyTree | None = None) -> UnitBlock:
    return UnitBlock(punch(information.units, shown))

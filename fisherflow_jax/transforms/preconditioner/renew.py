"""Factorisations renewed by parts, so that no step pays for all of them.

A part is a layer or a block. Parts are gathered into groups of about equal cost, and
the groups take turns.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Block, LayerBases, UnitBlock
from fisherflow_jax.structures._block import Grouped
from fisherflow_jax.transforms.preconditioner.factored import LayerInverses
from fisherflow_jax.transforms.preconditioner.factorise import (
    CholeskyFactors,
    Eigenbasis,
    LayerEigenbases,
)

Parts = list[tuple[str, int]]  # of each leaf: its part, and d^3 of its matrices


@functools.singledispatch
def parts(factorisation: Any) -> Parts:
    """The part to which each leaf of a factorisation belongs, and its cost."""
    raise ValueError(
        "spread_inverses=True renews layers or blocks by turns: of a "
        f"{type(factorisation).__name__} there is nothing to spread. It is for the "
        "structures kronecker and block."
    )


def _parts_by_layer(factorisation: Any) -> Parts:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(factorisation):
        square = leaf.ndim == 3 and leaf.shape[1] == leaf.shape[2]
        # the first key is the field, the second the layer
        found.append((path[1].key, leaf.size * leaf.shape[-1] if square else 0))
    return found


parts.register(LayerEigenbases, _parts_by_layer)
parts.register(LayerInverses, _parts_by_layer)
parts.register(LayerBases, _parts_by_layer)


def _parts_by_block(factorisation: CholeskyFactors | Eigenbasis) -> Parts:
    matrices, of_entries = factorisation
    if isinstance(matrices, Block):
        leaves = jax.tree.leaves(
            matrices.groups, is_leaf=lambda node: isinstance(node, Grouped)
        )
        names = [next(iter(leaf.rows)) for leaf in leaves]
        rows = [leaf.rows[name] for leaf, name in zip(leaves, names, strict=True)]
    elif isinstance(matrices, UnitBlock):
        rows = jax.tree.leaves(matrices.units)
        names = [str(index) for index in range(len(rows))]
    else:
        raise ValueError(
            "spread_inverses=True renews layers or blocks by turns: the structure of a "
            f"{type(matrices).__name__} information has one matrix, and nothing to "
            "spread."
        )
    del of_entries  # one leaf for each of the matrices'
    costs = [leaf.size * leaf.shape[0] for leaf in rows]
    return [*zip(names, costs, strict=True), *((name, 0) for name in names)]


parts.register(CholeskyFactors, _parts_by_block)
parts.register(Eigenbasis, _parts_by_block)


def balanced(costs: dict[str, int], num_groups: int) -> list[list[str]]:
    """The parts in at most so many groups, the dearest first to the cheapest group."""
    groups: list[list[str]] = [[] for _ in range(min(num_groups, len(costs)))]
    loads = [0] * len(groups)
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = loads.index(min(loads))
        groups[least].append(name)
        # a part of no cost counts too, or all of them would go to one group
        loads[least] += max(costs[name], 1)
    return groups


def turns(
    factorisation: Any, step: jax.Array, period: int, stride: int, staggered: bool
) -> list[tuple[jax.Array, list[str]]]:
    """`(whether it is its turn, names of its parts)` for each group, once a `period`.

    Turns are `stride` steps apart, or a multiple of it. At step 0 it is everyone's.
    """
    if not staggered:
        names = [name for name, _ in parts(factorisation)]
        return [(step % period == 0, list(dict.fromkeys(names)))]
    costs: dict[str, int] = {}
    for name, cost in parts(factorisation):
        costs[name] = costs.get(name, 0) + cost
    num_turns = period // stride
    groups = balanced(costs, num_turns)
    return [
        (
            (step == 0) | (step % period == index * num_turns // len(groups) * stride),
            group,
        )
        for index, group in enumerate(groups)
    ]


def renew(
    kept: Any,
    make: Callable[[], Any],
    allowed: jax.Array,
    step: jax.Array,
    period: int,
    staggered: bool,
) -> tuple[Any, jax.Array]:
    """The factorisation to use, and whether all that was due could be made."""
    leaves, treedef = jax.tree.flatten(kept)
    if not staggered:
        groups = [(step % period == 0, list(range(len(leaves))))]
    else:
        names = [name for name, _ in parts(kept)]
        groups = [
            (turn, [i for i, name in enumerate(names) if name in group])
            for turn, group in turns(kept, step, period, 1, True)
        ]
    sound = jnp.array(True)
    make = jax.jit(make)  # traced once, whatever the number of groups
    for turn, members in groups:
        old = [leaves[i] for i in members]

        def anew(members=members, old=old) -> tuple[list, jax.Array]:
            made = jax.tree.leaves(make())
            # the compiler drops what the other groups would need
            fresh = [made[i] for i in members]
            finite = trees.all_finite(fresh)
            return optax.tree.where(finite, fresh, old), finite

        fresh, finite = jax.lax.cond(
            allowed & turn, anew, lambda old=old: (old, jnp.array(True))
        )
        sound = sound & finite
        for index, leaf in zip(members, fresh, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves), sound

"""Factorisations renewed by parts, so that no step pays for all of them.

A part is a layer or a block. Parts are gathered into groups of about equal cost, and
the groups take turns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees

Parts = list[tuple[str, int]]  # of each leaf: its part, and d^3 of its matrices


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
    parts: Parts, step: jax.Array, period: int, stride: int, staggered: bool
) -> list[tuple[jax.Array, list[str]]]:
    """`(whether it is its turn, names of its parts)` for each group, once a `period`.

    Turns are `stride` steps apart, or a multiple of it; not staggered, all have one. At
    step 0 it is everyone's.
    """
    costs: dict[str, int] = {}
    for name, cost in parts:
        costs[name] = costs.get(name, 0) + cost
    num_turns = period // stride if staggered else 1
    groups = balanced(costs, num_turns)

    def is_turn(index: int) -> jax.Array:
        start = index * num_turns // len(groups) * stride
        return (step == 0) | (step % period == start)

    return [(is_turn(index), group) for index, group in enumerate(groups)]


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
    parts = ops.parts(kept) if staggered else [("whole", 0)] * len(leaves)
    sound = jnp.array(True)
    make = jax.jit(make)  # traced once, whatever the number of groups
    for turn, group in turns(parts, step, period, 1, staggered):
        members = [i for i, (name, _) in enumerate(parts) if name in group]
        old = [leaves[i] for i in members]

        def anew(members=members, old=old) -> tuple[list, jax.Array]:
            whole = make()
            telling = getattr(whole, "telling", whole)
            made, told = map(jax.tree.leaves, (whole, telling))
            # the compiler drops what the other groups would need
            fresh = [made[i] for i in members]
            finite = trees.all_finite([told[i] for i in members])
            return trees.where(finite, fresh, old), finite

        fresh, finite = jax.lax.cond(
            allowed & turn, anew, lambda old=old: (old, jnp.array(True))
        )
        sound = sound & finite
        for index, leaf in zip(members, fresh, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves), sound

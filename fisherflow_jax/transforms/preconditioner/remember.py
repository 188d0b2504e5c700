"""What a preconditioner remembers of its batches, and the mean that it reads off."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax.memories import Memory
from fisherflow_jax.memories._memory import Belief, Prior, Site, include
from fisherflow_jax.structures import Diagonal, Scalar

PyTree = Any

_NO_PRIOR = Prior(None, None)


class Remembered(NamedTuple):
    """The part of a preconditioner's state that batches change."""

    information: Any  # a sum, or a moving average that starts at zero
    observations: jax.Array  # () summed weights in it
    num_batches: jax.Array  # () int32
    memory: Any  # the memory's storage


def take_in(
    memory: Memory,
    before: Remembered,
    information: Any,
    weight: jax.Array | None,
    like: PyTree,
) -> Remembered:
    """What is remembered after a batch's information, of `weight` observations.

    `weight=None` is one observation, known to be there. `like` is a tree with the
    parameters' shapes.
    """
    belief = Belief(like, before.information, None, before.observations, None)
    belief = memory.predict(before.memory, belief, _NO_PRIOR)
    one, average = jnp.ones_like(before.observations), memory.average
    if average is None:
        site_weight = one if weight is None else weight
    else:
        site_weight = one * average.gain
        share: Any = average.gain
        if weight is not None:
            share = share / jnp.where(weight > 0, weight, one)
        information = ops.scale(information, share)
    site = Site(information, None, None, site_weight, None, None)
    belief = include(belief, site, like)
    storage, belief, _ = memory.remember(before.memory, belief, site, _NO_PRIOR)
    after = Remembered(
        belief.information, belief.count, before.num_batches + 1, storage
    )
    if average is None or weight is None:
        return after
    # a mean stays what it is when a batch has no observation
    return select(weight > 0, after, before)


def mean_information(memory: Memory, remembered: Remembered) -> Any:
    """The mean information of an observation; not finite before the first."""
    information, average = remembered.information, memory.average
    if average is not None and isinstance(information, (Scalar, Diagonal)):
        return average.debias(information, remembered.num_batches)
    return ops.scale(information, 1 / remembered.observations)


def select(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """One tree or the other, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), yes, no)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every entry of every leaf is finite, `()` bool."""
    found = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack([jnp.array(True), *found]))

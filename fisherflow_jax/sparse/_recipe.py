"""What is chosen of a sparse flow, and the state that it begins with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import memories
from fisherflow_jax._ground import checks
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories import Belief, Memory, Prior, Sum
from fisherflow_jax.sparse._state import SparseState
from fisherflow_jax.structures import Scalar


@dataclasses.dataclass(frozen=True)
class Recipe:
    likelihood: Likelihood
    num_features: int
    memory: Memory
    normalise: bool
    bad_rows: str


def init(
    recipe: Recipe, prior_mean: Any, *, prior_precision: Any, l1: Any, rate: Any
) -> SparseState:
    dtype, count = jnp.result_type(float), recipe.num_features

    def of_each(value: Any, name: str) -> jax.Array:
        value = jnp.array(value, dtype)
        if value.shape not in ((), (count,)):
            raise ValueError(
                f"{name} is a number or one a feature, shape ({count},); got shape "
                f"{value.shape}."
            )
        return value

    none = jnp.zeros((), jnp.int32)
    state = SparseState(
        curvature=jnp.zeros(count, dtype),
        shift=jnp.zeros(count, dtype),
        log_scale=jnp.zeros((), dtype),
        prior_mean=of_each(prior_mean, "prior_mean"),
        prior_entries=of_each(prior_precision, "prior_precision"),
        l1=jnp.array(l1, dtype),
        rate=None if rate is None else jnp.array(rate, dtype),
        memory=faded(recipe.memory)[0],
        count=jnp.zeros((), dtype),
        step=none,
        num_skipped=none,
        rows_skipped=none,
    )
    return jax.tree.map(jnp.copy, state)  # no two leaves share a buffer


def check_state(recipe: Recipe, state: Any) -> None:
    if not isinstance(state, SparseState):
        raise TypeError(
            "a sparse flow's functions take a state of its own init; got "
            f"{checks.described(state)}."
        )
    if state.shift.shape != (recipe.num_features,):
        raise ValueError(
            f"the state has {state.shift.size} features, and the flow "
            f"{recipe.num_features}."
        )


def faded(memory: Memory, storage: Any = None) -> tuple[Any, jax.Array]:
    """The memory's storage, and the factor by which an update fades a sum."""
    one = jnp.ones((), jnp.result_type(float))
    unit = Sum(curvature=Scalar(one), weight=one, linear=None)
    if storage is None:
        storage = memory.init(unit)
    # a unit of information that is all the prior's: the floor leaves it as it is
    belief = Belief(jnp.zeros_like(one), unit, Prior(jnp.zeros_like(one), Scalar(one)))
    try:
        aged = memories.age(storage, belief, jnp.ones((), jnp.int32))
    except TypeError as error:
        raise ValueError(
            f"a sparse flow's memory fades all by one number, which {memory.name} does "
            "not: take ff.memories.stationary() or exponential(decay)."
        ) from error
    kept = aged.sums.curvature.value
    if not checks.holds(2 * kept >= 1 + aged.sums.weight):
        raise ValueError(
            f"{memory.name} forgets the prior too (floor=False), which a feature that "
            "does not come back would lose altogether: keep the floor."
        )
    return storage, aged.sums.weight

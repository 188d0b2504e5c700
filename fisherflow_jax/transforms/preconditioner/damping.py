"""The damping that holds at a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax.transforms.preconditioner.state import ScaleByFisherState

Damping = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]


def at_start(damping: Damping, step: jax.Array) -> jax.Array:
    return jnp.asarray(damping(step) if callable(damping) else damping)


def at_present(damping: Damping, state: ScaleByFisherState) -> jax.Array:
    """A number is where the state started; schedules and arrays are asked again."""
    value: Any = state.damping
    if callable(damping):
        value = damping(state.step)
    elif not isinstance(damping, (int, float)):
        value = damping
    # a wrapper may have put a Python number into the state
    return jnp.asarray(value).astype(state.observations.dtype)

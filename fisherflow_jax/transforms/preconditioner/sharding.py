"""States whose sharding is that of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.sharding import has_explicit_axes
from fisherflow_jax._ground.sharding import in_auto_mode as in_auto_mode
from fisherflow_jax.structures import Diagonal

PyTree = Any


def zeros_like_parameters(information: Any, params: PyTree) -> Any:
    """An information of zeros, laid out over devices as the parameters are."""
    if not isinstance(information, Diagonal):
        return information
    return Diagonal(
        jax.tree.map(
            lambda x, like: jnp.zeros_like(like, dtype=x.dtype),
            information.entries,
            params,
        )
    )


def settled(state: Any) -> Any:
    """Copies of the arrays, laid out as an update will return them.

    No two share a buffer, so that a state may be donated to a compiled update; and what
    was made outside of the mesh, as a key, compiles no second update.
    """
    state = jax.tree.map(jnp.copy, state)
    if not has_explicit_axes():
        return state
    return jax.tree.map(
        lambda x: jax.sharding.reshard(x, jax.typeof(x).sharding), state
    )

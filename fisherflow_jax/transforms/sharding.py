"""States whose sharding is that of the parameters, and stays what it was."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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


def in_auto_mode(function: Callable, results_like: PyTree, *arguments: Any) -> Any:
    """`function(*arguments)`, the results sharded as `results_like` is.

    In a mesh with explicit axes the compiler places what lies between, as it does in an
    automatic one: models, estimators and factorisations need no `out_sharding`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return function(*arguments)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, results_like)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*arguments)

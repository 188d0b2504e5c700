"""Informations whose arrays add, entry by entry."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops


def scaled(information: Any, factor: jax.typing.ArrayLike) -> Any:
    """Every array times a number."""
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), information)


def total(stacked: Any, weights: jax.Array) -> Any:
    """The weighted sum of every array over its first axis."""
    return jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), stacked)


def refuse(left: Any, right: Any) -> Any:
    return NotImplemented


def check_same(left: Any, right: Any, kind: type) -> None:
    """Raises where two informations of a type are kept differently."""
    structures: list[Any] = [jax.tree.structure(x) for x in (left, right)]
    if structures[0] != structures[1]:
        raise TypeError(
            f"two {kind.__name__} informations add only when their partitions agree, "
            f"or their layers: got {structures[0]} and {structures[1]}."
        )


def register(kind: type, add_other: Callable[[Any, Any], Any] = refuse) -> None:
    """Gives a type `add_to`, `scale` and `total`; `add_other` adds other types."""

    def add_to(left: Any, right: Any) -> Any:
        if type(right) is not type(left):
            return add_other(left, right)
        check_same(left, right, kind)
        return jax.tree.map(jnp.add, left, right)

    ops.add_to.register(kind, add_to)
    ops.scale.register(kind, scaled)
    ops.total.register(kind, total)

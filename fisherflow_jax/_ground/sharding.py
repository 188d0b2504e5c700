"""Running a function among explicit axes of a mesh as among automatic ones.

Explicit axes demand a sharding of every operation on a batch that they cut. Models,
estimators and factorisations name none: between its arguments and its results the
compiler places what it likes, as it does in an automatic mesh. Axes are explicit only
within `jax.set_mesh`; elsewhere nothing is done.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

PyTree = Any


def in_auto_mode(function: Callable, results_like: PyTree, *arguments: Any) -> Any:
    """`function(*arguments)`, the results sharded as the arrays of `results_like`."""
    if not has_explicit_axes():
        return function(*arguments)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, results_like)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*arguments)


def replicated(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, the results whole on every device."""
    if not has_explicit_axes():
        return function(*arguments)
    whole = PartitionSpec()
    return jax.sharding.auto_axes(function, out_sharding=whole)(*arguments)


def has_explicit_axes() -> bool:
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)

"""Running a function among explicit axes of a mesh as among automatic ones.

Explicit axes demand a sharding of every operation on a batch that they cut. Models,
estimators and factorisations name none: between its arguments and its results the
compiler places what it likes, as it does in an automatic mesh. Axes are explicit only
within `jax.set_mesh`; elsewhere nothing is done.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any


def in_auto_mode(function: Callable, results_like: PyTree, *arguments: Any) -> Any:
    """`function(*arguments)`, the results sharded as the arrays of `results_like`."""
    if not has_explicit_axes():
        return function(*arguments)
    shardings = jax.tree.map(own, results_like)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*arguments)


def own(x: Any) -> NamedSharding:
    """Of an array; whole on the mesh that is set, if it was made on none."""
    known = jax.typeof(x).sharding
    if not known.mesh.empty:
        return known
    return NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())


def replicated(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, the results whole on every device."""
    if not has_explicit_axes():
        return function(*arguments)
    whole = PartitionSpec()
    return jax.sharding.auto_axes(function, out_sharding=whole)(*arguments)


def has_explicit_axes() -> bool:
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def automatic(mesh: Mesh | None) -> Mesh | None:
    """The mesh with automatic axes; `jax.make_mesh` makes explicit ones.

    Explicit axes would demand a sharding of every operation on a batch. Those of
    `jax.set_mesh` stay: all arrays lie on that mesh, and `in_auto_mode` treats them.

    Raises:
      ValueError: for what is no mesh.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh is a jax.sharding.Mesh or None; got {type(mesh).__name__}."
        )
    if mesh is None or mesh.abstract_mesh == jax.sharding.get_abstract_mesh():
        return mesh
    return Mesh(mesh.devices, mesh.axis_names)
